"""The model against transformers' Qwen2, and cached passes against uncached ones."""

import pytest
import torch
from helpers import CONFIG, random_model, random_tokens, reference_model

import qwen2_model
from harness import cpu
from qwen2_model import KVCache, Transformer

TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def new_cache(model: Transformer, rows: int, max_len: int) -> KVCache:
    return KVCache(
        model.config, batch_size=rows, max_len=max_len, device="cpu", dtype=torch.float32
    )


def assert_close(got, wanted, tolerance=1e-4):
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


# --- the numbers


@TIED
@torch.no_grad()
def test_logits_equal_transformers(tied):
    # Catches: `eps=config.rms_norm_eps` dropped; cos and sin swapped; bias=True -> False for
    # q_proj; a tied head that is not the embedding.
    model = random_model(tied=tied)
    tokens_BT = random_tokens(3, 71)
    logits_BTV = model(tokens_BT)
    assert logits_BTV.dtype == torch.float32
    assert logits_BTV.shape == (3, 71, 101)
    assert logits_BTV.std() > 1  # a comparison of near-constants would prove nothing
    assert_close(logits_BTV, reference_model(model)(tokens_BT).logits)


@TIED
def test_gradients_equal_transformers(tied):
    # Catches: a detached residual branch; `grad_BSI * up_BSI` -> `grad_BSI` in SwiGLU.backward.
    model = random_model(tied=tied)
    reference = reference_model(model)
    tokens_BT, weights_BTV = (
        random_tokens(2, 13),
        torch.randn(2, 13, 101, generator=torch.Generator().manual_seed(5)),
    )
    (model(tokens_BT) * weights_BTV).sum().backward()
    (reference(tokens_BT).logits * weights_BTV).sum().backward()
    wanted = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        scale = wanted[name].grad.norm().clamp(min=1)
        assert (parameter.grad - wanted[name].grad).norm() < 1e-5 * scale, name


@torch.no_grad()
def test_logits_of_a_bf16_model_are_float32():
    # Catches: `.float()` dropped in forward.
    model = random_model()
    wanted = model(random_tokens(2, 11))
    got = model.bfloat16()(random_tokens(2, 11))
    assert got.dtype == torch.float32
    assert (got - wanted).norm() < 0.03 * wanted.norm()


@torch.no_grad()
def test_right_padding_changes_nothing_before_it():
    # Catches: is_causal=True -> is_causal=False.
    model = random_model()
    tokens_BT = random_tokens(2, 17)
    padded_BT = torch.cat((tokens_BT, torch.full((2, 7), 3)), dim=1)
    assert_close(model(padded_BT)[:, :17], model(tokens_BT), 1e-5)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_recomputed_layers_give_the_same_gradients(layers):
    # Catches: `return None, x.grad` -> `return None, grad` in Recompute.
    model = random_model()
    tokens_BS = random_tokens(2, 11)
    positions_BS = torch.arange(11).expand(2, 11)
    gradients = []
    for recompute_layers in (0, layers):
        model.zero_grad()
        hidden_BSE = model.hidden_states(
            tokens_BS, positions_BS, qwen2_model.causal_attention, recompute_layers=recompute_layers
        )
        hidden_BSE.square().sum().backward()
        gradients.append(
            [p.grad.clone() for n, p in model.named_parameters() if n != "lm_head.weight"]
        )
    for plain, recomputed in zip(*gradients, strict=True):
        assert_close(recomputed, plain, 1e-6)


def test_gradients_of_frequent_tokens_are_summed_in_float32():
    # Catches: gradients of equal tokens added up in bf16 (off by 2.5 % instead of 0.2 %).
    model = random_model().bfloat16()
    frequencies = torch.tensor([1 / (i + 1) for i in range(89)])
    generator = torch.Generator().manual_seed(0)
    tokens_BS = torch.multinomial(frequencies, 6000, replacement=True, generator=generator)[None]
    grad_BSE = torch.randn(1, 6000, 60, generator=generator).bfloat16()
    model.embed(tokens_BS).backward(grad_BSE)
    wanted_VE = torch.zeros(101, 60, dtype=torch.float64)
    wanted_VE.index_add_(0, tokens_BS[0], grad_BSE[0].double())
    got_VE = model.model.embed_tokens.weight.grad.double()
    assert (got_VE - wanted_VE).norm() < 0.005 * wanted_VE.norm()


# --- the cache


@torch.no_grad()
def test_cached_logits_equal_uncached_ones():
    # Catches: `> positions_BS[:, :, None]` -> `>=`; positions that start at 0 in extend; columns
    # rounded down to KEY_BLOCK, which shows at position 64.
    model = random_model()
    tokens_BT = random_tokens(3, 71)
    wanted_BTV = model(tokens_BT)
    cache = new_cache(model, 3, 71)
    end = 0
    for num_tokens in (7, 1, 1, 52, 1, 1, 1, 1, 1, 5):
        end += num_tokens
        logits_BV = model.next_token_logits(tokens_BT[:, end - num_tokens : end], cache)
        assert_close(logits_BV, wanted_BTV[:, end - 1])
        assert cache.lengths_B.tolist() == [end] * 3


@torch.no_grad()
def test_an_inactive_slot_stays_as_it_was():
    # Catches: `positions_BS = self.lengths_B[...]` -> self.lengths_B.max(); `L * active_B` -> `L`.
    model = random_model()
    tokens_BT = random_tokens(2, 19)
    cache = new_cache(model, 2, 23)
    model.next_token_logits(tokens_BT[:, :5], cache)
    for t in range(5, 9):  # slot 1 pauses while slot 0 continues
        tokens_B1 = torch.stack((tokens_BT[0, t : t + 1], torch.tensor([42])))
        model.next_token_logits(tokens_B1, cache, active_B=torch.tensor([True, False]))
    assert cache.lengths_B.tolist() == [9, 5]
    logits_BV = model.next_token_logits(torch.stack((tokens_BT[0, 9:10], tokens_BT[1, 5:6])), cache)
    assert_close(logits_BV[0], model(tokens_BT[:1, :10])[0, -1])
    assert_close(logits_BV[1], model(tokens_BT[1:, :6])[0, -1])


@torch.no_grad()
def test_a_smaller_batch_uses_the_first_slots_only():
    # Catches: `cache.lengths_B[:B] += L` -> `cache.lengths_B += L`.
    model = random_model()
    tokens_BT = random_tokens(5, 13)
    cache = new_cache(model, 5, 17)
    model.next_token_logits(tokens_BT[:, :4], cache)
    untouched = cache.keys_LBKCD[:, 3:].clone(), cache.values_LBKCD[:, 3:].clone()
    logits_BV = model.next_token_logits(tokens_BT[:3, 4:6], cache)
    assert_close(logits_BV, model(tokens_BT[:3, :6])[:, -1])
    assert cache.lengths_B.tolist() == [6, 6, 6, 4, 4]
    assert torch.equal(cache.keys_LBKCD[:, 3:], untouched[0])
    assert torch.equal(cache.values_LBKCD[:, 3:], untouched[1])
    logits_BV = model.next_token_logits(torch.cat((tokens_BT[:3, 6:7], tokens_BT[3:, 4:5])), cache)
    assert_close(logits_BV[:3], model(tokens_BT[:3, :7])[:, -1])
    assert_close(logits_BV[3:], model(tokens_BT[3:, :5])[:, -1])


@torch.no_grad()
def test_copied_slots_continue_like_their_source():
    # Catches: `self.lengths_B[slots] = ...` left out of copy_slots; values not copied.
    model = random_model()
    tokens_BT = random_tokens(2, 7)
    source, target = new_cache(model, 2, 11), new_cache(model, 3, 13)
    model.next_token_logits(tokens_BT[:, :6], source)
    target.copy_slots(source, torch.tensor([1, 0, 1]), torch.tensor([0, 1, 2]), 6)
    target.longest = 6
    logits_BV = model.next_token_logits(tokens_BT[[1, 0, 1], 6:], target)
    assert_close(logits_BV, model(tokens_BT[[1, 0, 1]])[:, -1])


def test_a_full_cache_is_an_error_that_says_what_fits():
    model = random_model()
    cache = new_cache(model, 2, 7)
    with torch.no_grad():
        model.next_token_logits(random_tokens(2, 5), cache)
        with pytest.raises(
            ValueError, match=r"max_len=7 and 5 tokens are used; 3 more need max_len=8"
        ):
            model.next_token_logits(random_tokens(2, 3), cache)
        model.next_token_logits(random_tokens(2, 2), cache)  # what fits is still accepted


def test_bytes_per_token_match_the_cache():
    # Catches: the factor 2 for keys and values dropped.
    cache = new_cache(random_model(), 3, 7)
    wanted = cache.keys_LBKCD.nbytes + cache.values_LBKCD.nbytes
    assert KVCache.bytes_per_token(CONFIG, torch.float32) * 3 * 7 == wanted


# --- weights packed for decoding


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(
            dtype,
            marks=pytest.mark.skipif(
                not cpu.packs_for_decoding("cpu", dtype), reason=f"no oneDNN for {dtype} here"
            ),
        )
        for dtype in (torch.float32, torch.bfloat16)
    ],
    ids=str,
)
@TIED
def test_packed_weights_give_the_same_logits_and_end_with_the_rollout(tied, dtype, monkeypatch):
    # Catches: the bias dropped; the head left out or packed twice; packed weights that survive, so
    # that the next rollout uses old weights; `torch.is_grad_enabled()` dropped, which loses the
    # gradient.
    monkeypatch.setattr(cpu, "SMALL", 0)
    model = random_model(tied=tied).to(dtype)
    tokens_BT = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    with torch.no_grad():
        plain_BTV = model(tokens_BT)
        with cpu.packed_for_decoding(model, 2):
            packed = [
                name
                for module in model.modules()
                for name in ("forward", "logits")
                if name in vars(module)
            ]
            assert len(packed) == 7 * CONFIG.num_hidden_layers + 1
            packed_BTV = model(tokens_BT)
            with torch.enable_grad():
                model(tokens_BT).sum().backward()
            assert all(parameter.grad is not None for parameter in model.parameters())
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(
        packed_BTV, plain_BTV, rtol=tolerance, atol=tolerance * float(plain_BTV.std())
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
        torch.testing.assert_close(model(tokens_BT), fresh_copy(model)(tokens_BT), rtol=0, atol=0)


def fresh_copy(model: Transformer) -> Transformer:
    copy = Transformer(model.config).to(model.head_weight_VE.dtype)
    copy.load_state_dict(model.state_dict())
    return copy
