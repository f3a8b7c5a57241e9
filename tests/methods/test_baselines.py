"""SHiRA, FishMask and BitFit against brute force: dense autograd and a stable sort over everything at once."""

import copy
import itertools

import pytest
import torch
import transformers as tf

from intaglio import Batches, BitFit, FishMask, PaFi, Random, Selection, SHiRA, attach
from intaglio.core.budget import largest_remainder
from intaglio.core.entries import Whole
from intaglio.core.scores import fisher
from intaglio.method_kinds.method import matching
from intaglio.model.calibration import gradient_means
from intaglio.model.structure import layer_matrices
from support import tiny

SIX = ["gqa_llama", "tied_llama", "fused_phi3", "transposed_gpt2", "qwen2_moe", "deberta"]
MASKS = ("random", "magnitude", "gradient", "snip")


def rows(name, count=5):
    """A batch with a row that teaches nothing, where labels are tokens."""
    whole = tiny.batch(name, rows=count)
    if name in tiny.CAUSAL:
        whole["labels"] = whole["labels"].clone()
        whole["labels"][2] = -100
    return whole


def probe(name, split=(5,)):
    whole = rows(name, sum(split))
    parts = {key: value.split(list(split)) for key, value in whole.items()}
    return Batches([{key: parts[key][i] for key in parts} for i in range(len(split))])


def dense_means(model, name, term, samples=None):
    """Mean over examples of `term` of whole gradients, all of them alive at once."""
    model, whole = copy.deepcopy(model), rows(name)
    examples = [{key: value[row : row + 1] for key, value in whole.items()} for row in range(5)]
    examples = [e for e in examples if bool((e["labels"] != -100).any())][:samples]
    sums = {key: torch.zeros_like(p) for key, p in model.named_parameters()}
    for example in examples:
        model.zero_grad()
        model(**example).loss.backward()
        for key, p in model.named_parameters():
            sums[key] += 0 if p.grad is None else term(p.grad)
    return {key: total / len(examples) for key, total in sums.items()}


def best(score, count):
    """Offsets of the `count` best entries of one flat tensor, by a stable sort."""
    return torch.argsort(score.flatten(), descending=True, stable=True)[:count].sort().values


def best_of_all(scores, count):
    """Name → offsets of the `count` best entries of all tensors, by one stable sort over their concatenation."""
    chosen = best(torch.cat([score.flatten() for score in scores.values()]), count)
    ends = list(itertools.accumulate((score.numel() for score in scores.values()), initial=0))
    split = {key: chosen[(chosen >= a) & (chosen < b)] - a for key, a, b in zip(scores, ends[:-1], ends[1:], strict=True)}
    return {key: offsets for key, offsets in split.items() if len(offsets)}


def chosen(method, model, data=None, exclude=None):
    return method.choose(model, data, exclude or Selection())


def same(selection, expected):
    assert selection.keys() == expected.keys()
    assert all(torch.equal(entries.flat(), expected[key]) for key, entries in selection.items())


@pytest.mark.parametrize("name", tiny.MODELS)
@pytest.mark.parametrize("samples", [None, 2])
def test_fishmask_is_the_top_of_the_mean_squared_gradients(name, samples):
    """ID3 checklist 31."""
    model = tiny.build(name)
    expected = dense_means(model, name, torch.square, samples)
    same(chosen(FishMask(budget=777, samples=samples), model, probe(name)), best_of_all(expected, 777))


@pytest.mark.parametrize("name", SIX)
@pytest.mark.parametrize("mask", MASKS[1:])
def test_shira_is_the_top_of_each_matrix(name, mask):
    """ID3 checklist 31: and each has its share."""
    model = tiny.build(name)
    size = dense_means(model, name, torch.abs)
    targets = [key for key, _ in model.named_parameters() if key in layer_matrices(model)]
    weights = {key: model.get_parameter(key).detach() for key in targets}
    score = {"magnitude": lambda k: weights[k].abs(), "gradient": size.get, "snip": lambda k: (size[k] * weights[k]).abs()}
    selection = chosen(SHiRA(budget=0.04, mask=mask), model, probe(name))
    total = sum(w.numel() for w in weights.values())
    assert selection.size == int(0.04 * total + 0.5)
    assert all(abs(entries.count - 0.04 * entries.numel) < 1 for entries in selection.values())
    same(selection, {key: best(score[mask](key), selection[key].count) for key in targets})


def test_shira_random_differs_by_seed_and_name_alone():
    model, other = tiny.build("gqa_llama"), tiny.build("gqa_llama", seed=4)
    first = chosen(SHiRA(mask="random"), model)
    assert first == chosen(SHiRA(mask="random"), other)
    assert first != chosen(SHiRA(mask="random", seed=1), model)
    layers = [first[f"model.layers.{i}.mlp.up_proj.weight"].flat().tolist() for i in (0, 1)]
    assert layers[0] != layers[1]


@pytest.mark.parametrize("name", tiny.MODELS)
def test_shira_targets_the_matrices_of_the_layers(name):
    model = tiny.build(name)
    targets = SHiRA().selectable(model)
    for layer in ("0", "1"):
        assert any(f".{layer}." in target for target in targets)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for key, parameter in model.named_parameters():
        inside = any(f"{stack}.{i}." in key for stack in ("layers", "layer", "h") for i in (0, 1))
        assert (key in targets) == (inside and parameter.dim() >= 2)
        assert not (key in targets and id(parameter) in tables)
    everywhere = SHiRA(include=("*",)).selectable(model)
    assert everywhere == {key for key, p in model.named_parameters() if p.dim() >= 2}


@pytest.mark.parametrize(
    ("total", "sizes"), [(10, [3, 3, 3, 3]), (1, [5, 5]), (7, [1, 6, 0]), (99, [7, 31, 100]), (4, [1, 1, 2])]
)
def test_shares_are_exact(total, sizes):
    quotas = largest_remainder(total, sizes)
    assert sum(quotas) == total
    assert all(abs(quota - total * size / sum(sizes)) < 1 and quota <= size for quota, size in zip(quotas, sizes, strict=True))
    assert largest_remainder(10**18 + 1, [10**18, 10**18])[0] == 5 * 10**17 + 1


@pytest.mark.parametrize("method", [FishMask(budget=0.03), *(SHiRA(budget=0.03, mask=m) for m in MASKS[2:])], ids=str)
def test_the_split_into_batches_changes_nothing(method):
    model = tiny.build("gqa_llama")
    selections = [chosen(method, model, probe("gqa_llama", split)) for split in ((5,), (1, 3, 1), (2, 2, 1))]
    assert selections[0] == selections[1] == selections[2]


@pytest.mark.parametrize("method", [FishMask(budget=0.03), SHiRA(mask="snip"), SHiRA(), BitFit()], ids=str)
@pytest.mark.parametrize("name", ["transposed_gpt2", "qwen2_moe", "bert"])
def test_looking_leaves_no_trace(method, name):
    model = tiny.build(name).train()
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    first.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]
    random_state = torch.random.get_rng_state()
    chosen(method, model, probe(name))
    assert torch.equal(random_state, torch.random.get_rng_state())
    assert flags == ([module.training for module in model.modules()], [p.requires_grad for p in model.parameters()])
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(p.grad is None for p in list(model.parameters())[1:])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_gradients_never_coexist_and_sums_are_fp32():
    model = tiny.build("gqa_llama", dtype=torch.bfloat16)
    alive = []
    weights = dict(model.named_parameters())
    handles = [
        p.register_hook(lambda g: alive.append(sum(w.grad is not None for w in weights.values()))) for p in weights.values()
    ]
    means = gradient_means(model, weights, probe("gqa_llama"), fisher)
    for handle in handles:
        handle.remove()
    assert len(alive) == 4 * len(weights)
    assert max(alive) == 0
    assert {mean.dtype for mean in means.values()} == {torch.float32}
    assert all(mean.shape == weights[key].shape for key, mean in means.items())


def test_an_expert_that_no_token_reaches_scores_nothing():
    model = tiny.build("gqa_llama")
    model.extra = torch.nn.Linear(3, 3)
    means = gradient_means(model, dict(model.named_parameters()), probe("gqa_llama"), fisher)
    assert torch.equal(means["extra.weight"], torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"the loss depends on none of extra\.weight"):
        chosen(FishMask(budget=3, include=("extra.weight",)), model, probe("gqa_llama"))


@pytest.mark.parametrize("method", [FishMask(budget=0.1), *(SHiRA(budget=0.1, mask=m) for m in MASKS)], ids=str)
def test_exclusion_gives_the_next_best(method):
    model, data = tiny.build("gqa_llama"), probe("gqa_llama")
    first = chosen(method, model, data)
    second = chosen(method, model, data, first)
    assert second.overlap(first) == 0
    free = sum(model.get_parameter(key).numel() for key in method.selectable(model)) - first.size
    assert second.size == int(0.1 * free + 0.5)
    double = chosen(type(method)(**{**vars(method), "budget": first.size + second.size}), model, data)
    assert first.union(second).overlap(double) >= double.size - len(double)  # quotas are rounded per matrix
    everything = Selection({key: Whole(tuple(model.get_parameter(key).shape)) for key in method.selectable(model)})
    with pytest.raises(ValueError, match="nothing is left to choose from"):
        chosen(method, model, data, everything)


def test_bitfit_counts_are_the_papers():
    """ID3 section 1.6: DeBERTa-v3-base, 102,912 biases in the backbone, 103,682 in all, 123,650 of one dimension."""
    config = tf.DebertaV2Config(
        vocab_size=128100, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, num_labels=2,
        relative_attention=True, position_buckets=256, norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type=["p2c", "c2p"],
        max_relative_positions=-1, position_biased_input=False, type_vocab_size=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = tf.DebertaV2ForSequenceClassification(config)
    assert sum(p.numel() for p in model.parameters()) == 184_423_682
    for method, count in [
        (BitFit(include=("deberta.*",)), 102_912),
        (BitFit(exclude=("pooler.*", "classifier.*")), 102_912),
        (BitFit(), 103_682),
        (BitFit(tensors="one_dimensional"), 123_650),
    ]:
        selection = chosen(method, model)
        assert selection.size == count
        assert all(isinstance(entries, Whole) for entries in selection.values())


@pytest.mark.parametrize("name", tiny.MODELS)
def test_bitfit_finds_every_bias(name):
    """Of the projections, fused or not, of norms, experts and the head, and DeBERTa's q_bias and v_bias."""
    model = tiny.build(name)
    named = ("bias", "q_bias", "v_bias", "gate_up_proj_bias", "down_proj_bias")
    expected = {key for key, _ in model.named_parameters() if key.split(".")[-1] in named}
    flat = {key for key, p in model.named_parameters() if p.dim() == 1}
    assert set(chosen(BitFit(tensors="one_dimensional"), model)) == flat
    if expected:
        assert set(chosen(BitFit(), model)) == expected
        return
    with pytest.raises(ValueError, match=r"tensors='biases': \w+ has none .* tensors='one_dimensional' trains the scales"):
        attach(model, BitFit())


def test_bitfit_trains_key_biases_and_respects_exclusion():
    model = tiny.build("qkv_bias_qwen2")
    selection = chosen(BitFit(), model)
    assert {key.split(".")[-2] for key in selection} == {"q_proj", "k_proj", "v_proj"}
    first = Selection(dict(list(selection.items())[:2]))
    assert chosen(BitFit(), model, exclude=first) == selection.difference(first)
    with pytest.raises(ValueError, match="selects nothing"):
        attach(model, BitFit(), exclude=selection)


def test_patterns_include_and_exclude():
    model = tiny.build("gqa_llama")
    everything = dict(model.named_parameters())
    assert matching(model, ("*",), ("*.mlp.*", "lm_head*")).keys() == {
        key for key in everything if ".mlp." not in key and "lm_head" not in key
    }
    assert list(matching(model, ("*.mlp.*",))) == [key for key in everything if ".mlp." in key]
    for method in (Random(exclude=("*.mlp.*",)), PaFi(exclude=("*.mlp.*",)), SHiRA(exclude=("*.mlp.*",))):
        selection = chosen(method, model)
        assert selection.size > 0
        assert not any(".mlp." in key for key in selection)
    with pytest.raises(ValueError, match=r"exclude: the pattern '\*.moe.\*' matches no parameter; names look like"):
        attach(model, Random(exclude=("*.moe.*",)))
    with pytest.raises(ValueError, match="nothing is left to choose from"):
        attach(model, Random(exclude=("*",)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FishMask(budget=0, samples=0), "FishMask: budget=0: .*; samples=0: give a number of examples"),
        (lambda: FishMask(samples=True), "samples=True"),
        (
            lambda: SHiRA(mask="wm", include="*"),
            r"SHiRA: include='\*': give a tuple of patterns, \('\*',\); mask='wm': known are random",
        ),
        (lambda: SHiRA(seed=3), "seed=3 has no effect with mask='magnitude'"),
        (lambda: SHiRA(exclude=("a", 3)), r"exclude=\('a', 3\): give a tuple of patterns"),
        (
            lambda: BitFit(tensors="all", include=[]),
            r"BitFit: include=\[\]: .*; tensors='all': known are biases, one_dimensional",
        ),
        (lambda: Random(exclude="x"), r"exclude='x': give a tuple of patterns, \('x',\)"),
    ],
)
def test_bad_fields_are_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_mistakes_are_explained_before_anything_changes():
    model, name = tiny.build("gqa_llama"), "gqa_llama"
    before = {key: value.clone() for key, value in model.state_dict().items()}
    bare = {key: value for key, value in rows(name).items() if key != "labels"}
    untaught = rows(name) | {"labels": torch.full((5, 12), -100)}
    for method, data, message in [
        (FishMask(), None, r"FishMask\(.*\): looks at data: give a probe"),
        (SHiRA(mask="snip"), None, "looks at data: give a probe"),
        (FishMask(budget=10**9), Batches([bare]), "budget=1000000000: a count must lie between"),  # before data is looked at
        (FishMask(samples=5), probe(name), "samples=5: the probe has 4 examples with labels"),
        (FishMask(), Batches([bare]), "add `labels`"),
        (FishMask(), Batches([untaught]), "every label is -100"),
        (SHiRA(include=("*norm*",)), None, "no matrix to target in LlamaForCausalLM"),
        (SHiRA(budget=1e-9), None, "rounds to nothing"),
    ]:
        with pytest.raises(ValueError, match=message):
            attach(model, method, probe=data)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert all(p.requires_grad and p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())
    with pytest.raises(ValueError, match="no matrix to target in Sequential"):
        attach(torch.nn.Sequential(torch.nn.Linear(4, 4)), SHiRA())
    assert attach(torch.nn.Sequential(torch.nn.Linear(4, 4)), SHiRA(budget=3, include=("*",))).selection.size == 3


@pytest.mark.parametrize("method", [FishMask(), SHiRA(mask="gradient"), SHiRA(mask="snip")], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_are_refused(method, value):
    model = tiny.build("gqa_llama")
    handle = model.model.layers[1].mlp.up_proj.weight.register_hook(lambda g: g.index_fill(0, torch.tensor([3]), value))
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight: has gradients that are not finite"):
        attach(model, method, probe=probe("gqa_llama"))
    handle.remove()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
