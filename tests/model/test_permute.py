"""Co-permutation: outputs stay, the order is undone exactly, and the trained weights are those of the index form."""

import copy

import pytest
import torch
import transformers as tf

from intaglio import S2FT, Batches, Delta, PaFi, attach
from intaglio.core.entries import Slices
from intaglio.core.selection import Selection
from intaglio.model.permute import co_permute
from intaglio.model.structure import describe
from support import tiny

ALL = S2FT(q=0.25, k=0.5, v=0.5, o=0.5, up=0.2, gate=None, down=0.3, seed=5)


def logits(model, name, **more):
    batch = tiny.batch(name)
    batch["attention_mask"][0, 8:] = 0
    with torch.no_grad():
        return model(**{k: v for k, v in (batch | more).items() if k != "labels"})[0]


def method(name, **fields):
    heads = {"o": None} if name in tiny.FIXED_HEADS else {"o": 0.5} if name == "gemma4_moe" else {"o": 0.5, "v": 0.5}
    return S2FT(**({"down": 0.25, "up": 0.4} | heads | fields))


def state_hash(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", tiny.DESCRIBED)
def test_outputs_stay_and_the_order_is_undone(name, seed):
    """S2FT checklist 1 and 2: < 1e-5 with randomised norms and biases, then every bit back."""
    model = tiny.build(name)
    before, base = logits(model, name), state_hash(model)
    tuner = attach(model, method(name, seed=seed), permute=True)
    moved = [key for key, value in model.state_dict().items() if not torch.equal(value, base[key])]
    assert moved
    assert (logits(model, name) - before).abs().max() < 1e-5
    tuner.detach()
    assert all(torch.equal(value, base[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", [n for n in tiny.CAUSAL if n != "opt"])
def test_outputs_stay_with_a_cache(name):
    """S2FT checklist 1: decoding token by token with a KV cache gives the same tokens and logits."""
    model, prompt = tiny.build(name), tiny.batch(name)["input_ids"][:, :5]
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    before = model.generate(prompt, **settings)
    attach(model, method(name), permute=True)
    after = model.generate(prompt, **settings)
    assert torch.equal(before.sequences, after.sequences)
    torch.testing.assert_close(torch.stack(before.logits), torch.stack(after.logits), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "gqa_llama",
        "fused_phi3",
        "transposed_gpt2",
        "interleaved_neox",
        "qk_norm_olmo2",
        "mixtral",
        "bert",
        "grouped_falcon",
        "experts_gpt_oss",
        "latent_deepseek_v3",
        "gated_qwen3_5",
        "widths_gemma4",
    ],
)
def test_index_and_permuted_form_train_the_same_weights(name):
    """S2FT checklist 4: equal gradients at the first step, equal weights after 20 (fp64)."""
    deltas, gradients = [], []
    for permute in (False, True):
        model = tiny.build(name, dtype=torch.float64)
        tuner = attach(model, ALL, permute=permute)
        optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-3, weight_decay=0.1)
        for step in range(20):
            model(**tiny.batch(name, seed=step)).loss.backward()
            if step == 0:
                gradients.append({slot.name: slot.values.grad.norm() for slot in tuner.slots})
            optimizer.step()
            optimizer.zero_grad()
        deltas.append(tuner.delta())
    index, permuted = deltas
    assert index.selection == permuted.selection
    assert index.fingerprints == permuted.fingerprints
    for key, value in index.values.items():
        # models compute norms and rotations in fp32 even here, and sums over another order round differently
        torch.testing.assert_close(value, permuted.values[key], rtol=0, atol=1e-6)
        torch.testing.assert_close(gradients[0][key], gradients[1][key], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["gqa_llama", "transposed_gpt2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapter_is_in_base_coordinates(name, dtype, tmp_path):
    """S2FT checklist 16: applied to a fresh, unpermuted base it gives the trained model, in any type."""
    model = tiny.build(name, dtype=dtype)
    tuner = attach(model, method(name), permute=True)
    optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-2)
    model(**tiny.batch(name)).loss.backward()
    optimizer.step()
    permuted = logits(model, name)
    tuner.save(tmp_path / "adapter")
    trained = tuner.detach()
    fresh = tiny.build(name, dtype=dtype)
    Delta.load(tmp_path / "adapter").apply_(fresh)
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in fresh.state_dict().items())
    torch.testing.assert_close(logits(fresh, name), permuted, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)


def test_slices_become_dense():
    """Under multi-head attention every chosen set is a run of neighbours, also where v and o choose different heads."""
    tuner = attach(tiny.build("mha_llama"), method("mha_llama", seed=3), permute=True)
    base = attach(tiny.build("mha_llama"), method("mha_llama", seed=3))
    scattered = [slot.entries.index for slot in base.slots]
    for slot in tuner.slots:
        first, length = int(slot.entries.index[0]), len(slot.entries.index)
        assert torch.equal(slot.entries.index, torch.arange(first, first + length))
    assert any(int(index[-1] - index[0]) >= len(index) for index in scattered)


@pytest.mark.parametrize("heads", [(8, 2), (8, 4), (6, 1)])
def test_grouped_query_attention_of_other_shapes(heads):
    """S2FT checklist 1: (query, key-value) heads 8/2, 8/4 and 6/1; query heads stay inside their group."""
    queries, groups = heads
    torch.manual_seed(0)
    sizes = {"num_attention_heads": queries, "num_key_value_heads": groups, "head_dim": 8}
    sizes |= {"hidden_size": 48, "attention_bias": True, "mlp_bias": True}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**(tiny.LLAMA | sizes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    before = logits(model, "gqa_llama")
    for seed in range(4):
        tuner = attach(model, S2FT(o=5, v=groups, k=groups, q=3, down=0.3, seed=seed), permute=True)
        assert (logits(model, "gqa_llama") - before).abs().max() < 1e-5
        tuner.detach()


def test_resume_continues_bit_for_bit():
    def start():
        tuner = attach(tiny.build("gqa_llama", dtype=torch.bfloat16), method("gqa_llama"), permute=True)
        return tuner, tuner.optimizer(torch.optim.AdamW, lr=1e-3)

    def go(tuner, optimizer, seeds):
        for seed in seeds:
            tuner.model(**tiny.batch("gqa_llama", seed=seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    tuner, optimizer = start()
    go(tuner, optimizer, range(5))
    state, moments = copy.deepcopy(tuner.state_dict()), copy.deepcopy(optimizer.state_dict())
    go(tuner, optimizer, range(5, 10))
    resumed, again = start()
    resumed.load_state_dict(state)
    again.load_state_dict(moments)
    go(resumed, again, range(5, 10))
    left, right = tuner.delta(), resumed.delta()
    assert all(torch.equal(value, right.values[key]) for key, value in left.values.items())
    index = attach(tiny.build("gqa_llama", dtype=torch.bfloat16), method("gqa_llama"))
    with pytest.raises(ValueError, match="other entries"):
        index.load_state_dict(state)


def test_home_made_stack_needs_a_sample():
    model = tiny.Homemade()
    with pytest.raises(ValueError, match=r"no config to make a sample input from.*probe=Batches"):
        attach(model, S2FT(o=None, down=0.25), permute=True)
    x = torch.randn(3, 8)
    before = model(x)
    attach(model, S2FT(o=None, down=0.25), permute=True, probe=Batches([{"x": x}]))
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-6)


def test_refusals_leave_the_model_unchanged():
    """S2FT checklist 3: scattered entries, an empty choice and weights shared by layers are refused, every bit in its place."""
    model = tiny.build("gqa_llama")
    base = state_hash(model)
    with pytest.raises(ValueError, match="no whole heads or channels"):
        attach(model, PaFi(budget=0.1), permute=True)
    projection = describe(model)[0].projections["down"]
    with pytest.raises(ValueError, match="no whole heads or channels"):
        co_permute(model, Selection(), None)
    assert all(p.requires_grad for p in model.parameters())
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    with pytest.raises(ValueError, match="is shared between layers"):
        co_permute(model, Selection({projection.parameter: Slices(projection.shape, 1, torch.tensor([3]))}), None)
    assert all(torch.equal(value, base[key]) or "1.mlp.down" in key for key, value in model.state_dict().items())


def test_an_unknown_coupling_is_noticed():
    """A gate per head that no row names: the forward pass tells, and everything is put back."""
    model = tiny.build("mha_llama")

    def scale_heads(module, inputs):
        return (inputs[0] * torch.arange(1.0, 5.0).repeat_interleave(8),)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(scale_heads)
    base = state_hash(model)
    with pytest.raises(ValueError, match="changes the model's outputs by"):
        attach(model, S2FT(o=4, down=None, seed=1), permute=True)
    assert all(torch.equal(value, base[key]) for key, value in model.state_dict().items())
    assert "intaglio_slots" not in model._modules


@pytest.mark.parametrize("name", tiny.FIXED_HEADS)
def test_heads_that_are_tied_to_their_places_are_noticed(name):
    model = tiny.build(name)
    base = state_hash(model)
    with pytest.raises(ValueError, match="couples its heads"):
        attach(model, S2FT(q=1, o=3, down=None, seed=3), permute=True)
    assert all(torch.equal(value, base[key]) for key, value in model.state_dict().items())


def test_detach_twice_and_after_a_move():
    model = tiny.build("gqa_llama")
    base = state_hash(model)
    tuner = attach(model, method("gqa_llama"), permute=True)
    model.to(torch.float64)
    tuner.detach()
    assert all(torch.equal(value, base[key].double()) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="detached already"):
        tuner.detach()
    tuner = attach(model.float(), method("gqa_llama"), permute=True)
    with pytest.raises(ValueError, match="attached already"):
        attach(model, method("gqa_llama"), permute=True)
    model.model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(torch.zeros(32, 40))
    with pytest.raises(ValueError, match="the order cannot be undone"):
        tuner.detach()
