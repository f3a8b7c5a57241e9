"""Layers that train in turn, on real models: what moves, what rests, what is kept, what resumes."""

import copy
import json

import peft
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from intaglio import ID3, IST, LISA, RST, S2FT, BitFit, Full, Updates, attach
from intaglio.training.damping import bare_tensors
from intaglio.training.regime import Wish
from intaglio.training.rotation import Rotation
from support import tiny
from support.layers import NAME, adapted, attached, changed, layer_of, lora, probe, run, same, shake, stack, update, weights

# what is trained in turn: method, and the model it is attached to
CASES = {
    "lora": (IST(layers=2, interval=7), adapted),
    "lora, drop": (IST(layers=2, interval=7, state="drop"), adapted),
    "dora": (IST(layers=2, interval=7), lambda: adapted(use_dora=True)),
    "lora, rst": (RST(layers=2, policy="contiguous"), adapted),
    "lora and head": (RST(layers=3), lambda: adapted(modules_to_save=["lm_head"])),
    "s2ft": (IST(layers=2, interval=7, of=S2FT(o=0.5, down=0.25, v=0.25)), stack),
    "full": (IST(layers=2, interval=7, of=Full()), stack),
    "full, bf16": (IST(layers=2, interval=7, of=Full()), lambda: stack(dtype=torch.bfloat16)),
    "norms": (RST(layers=2, of=BitFit(tensors="one_dimensional")), stack),
    "lisa": (LISA(redraw=2), stack),
    "id3": (IST(layers=2, interval=7, of=ID3(budget=0.02, steps=40)), stack),
    "id3 on lora": (IST(layers=2, interval=7, of=ID3(budget=0.2, steps=40)), adapted),
}
each = pytest.mark.parametrize("case", CASES)


def start(case):
    method, build = CASES[case]
    model = build()
    if not method.chooser.chooses_before:
        return model, attached(model, method, updates=Updates(accumulation="exact"))
    return model, attached(model, method)


@each
def test_idle_layers_keep_every_bit(case):
    """IST checklist 5, 6, 8: 50 updates, weight decay 0.1, clipping 1, accumulation 4: what changes lies in the active
    layers, all of which change, or outside; idle layers have no gradient at all.
    """
    model, tuner = start(case)
    optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    first, moved = weights(model), set()
    for step in range(50):
        before, active = weights(model), set(tuner.rotation.active)
        for micro in range(4):
            (model(**tiny.batch(NAME, seed=4 * step + micro)).loss / 4).backward()
            assert set(tuner.rotation.active) == active
        gradients = {slot.name for slot in tuner.slots if slot.values.grad is not None}
        assert {layer_of(name) for name in gradients} - {None} == active
        assert all(p.grad is None for name, p in model.named_parameters() if layer_of(name) not in {*active, None})
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        layers = {layer_of(name) for name in changed(before, weights(model))}
        assert layers - {None} == active or (case == "id3" and layers - {None} < active)  # it may choose in some of them
        assert (None in layers) == any(layer_of(name) is None for name in tuner.selection)
        moved |= active
    assert moved == set(range(8))
    assert {layer_of(name) for name in changed(first, weights(model))} - {None} == moved
    assert sum(tuner.rotation.visits) == 50 * tuner.rotation.method.active_count(8)


def test_all_is_trainable_until_the_first_forward():
    """IST checklist 7: whoever builds an optimizer or wraps the model after `attach` sees every parameter."""
    model = adapted()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    tuner = attached(model, RST(layers=2))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    model.eval()(**tiny.batch(NAME))
    assert all(p.requires_grad for name, p in model.named_parameters() if name in trainable)  # evaluation is no training
    optimizer = tuner.optimizer(torch.optim.SGD, lr=0.1)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(s.values) for s in tuner.slots}
    assert {slot.name for slot in tuner.slots} == trainable
    model.train()(**tiny.batch(NAME))
    assert {layer_of(name) for name, p in model.named_parameters() if p.requires_grad} == set(tuner.rotation.active)


def test_a_loop_that_goes_round_the_model_cannot_train_idle_layers():
    """The inner module called directly: the hook on the whole model is never seen."""
    model = adapted()
    tuner = attached(model, RST(layers=2))
    optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-2)
    before, active = weights(model), set(tuner.rotation.active)
    model.base_model.model(**tiny.batch(NAME)).loss.backward()
    optimizer.step()
    assert {layer_of(name) for name in changed(before, weights(model))} == active


@pytest.mark.parametrize("state", ["keep", "drop", "offload"])
def test_state_of_idle_layers(state):
    """IST checklist 9: "drop" holds no state but the active layers'; "offload" moves no bit of the run."""
    model = adapted()
    tuner = attached(model, RST(layers=2, state=state, redraw=4))
    optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-2)
    seen = set()
    for step in range(40):
        active = set(tuner.rotation.active)
        seen |= active
        update(model, optimizer, step)
        held = {layer_of(slot.name) for slot in tuner.slots if slot.values in optimizer.state}
        redrawn = tuner.rotation.method.draws_at(step + 1)
        assert held == ((active & set(tuner.rotation.active) if redrawn else active) if state == "drop" else seen)
    numbers = sum(t.numel() for s in optimizer.state.values() for key, t in s.items() if key != "step")
    assert state != "drop" or numbers <= 2 * sum(p.numel() for p in tuner.parameters()) * 2 / 8


def test_offload_equals_keep_and_drop_starts_afresh():
    ends = {}
    for state in ("keep", "offload", "drop"):
        model = adapted()
        run(model, attached(model, RST(layers=2, state=state)), 30)
        ends[state] = weights(model)
    assert same(ends["keep"], ends["offload"])
    assert not same(ends["keep"], ends["drop"])


def test_keep_is_the_plain_trajectory():
    """IST checklist 9: as a loop of one's own that sets the gradients of idle layers to None."""
    model, plain = adapted(), adapted()
    tuner = attached(model, RST(layers=2, idle_dropout=True))
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    run(model, tuner, 20)
    draws = dict(tuner.rotation.history["draws"])
    for step in range(20):
        torch.manual_seed(step)
        plain(**tiny.batch(NAME, seed=1000 * step)).loss.backward()
        for name, parameter in plain.named_parameters():
            if layer_of(name) not in draws[step]:
                parameter.grad = None
        optimizer.step()
        optimizer.zero_grad()
    assert same(weights(model), weights(plain))


def test_all_layers_active_is_plain_training():
    """IST checklist 3 and 24: every layer active and probes on: the run of LoRA alone, dropout and all, bit for bit."""
    model, plain = adapted(), adapted()
    tuner = attached(model, IST(layers=1.0, interval=2))
    optimizers = [
        tuner.optimizer(torch.optim.AdamW, lr=1e-2),
        torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2),
    ]
    for one, optimizer in zip((model, plain), optimizers, strict=True):
        torch.manual_seed(0)
        for step in range(12):
            update(one, optimizer, step)
    assert tuner.rotation.probes == 6
    assert float(tuner.rotation.importance.abs().max()) > 0
    assert same(weights(model), weights(plain))


def test_rst_is_ist_that_learns_nothing():
    """IST checklist 4: IST at rate 0, and at one so small that probes run and teach nothing: the same weights."""
    ends = []
    for method in (RST(layers=2), IST(layers=2, rate=0), IST(layers=2, rate=1e-300, interval=2)):
        model = adapted()
        tuner = attached(model, method)
        run(model, tuner, 20)
        ends.append((weights(model), [layers for _, layers in tuner.rotation.history["draws"]]))
    assert tuner.rotation.probes == 10
    for found, draws in ends[1:]:
        assert draws == ends[0][1]
        assert same(found, ends[0][0])


@each
def test_stop_at_37_and_go_on(case):
    """IST checklist 23: a fresh model, tuner and optimizer continue as the run that never stopped, bit for bit."""
    model, tuner = start(case)
    optimizer = run(model, tuner, 37)
    state = json.loads(json.dumps(tuner.state_dict()["rotation"]))
    saved = copy.deepcopy(tuner.state_dict()) | {"rotation": state}
    moments, tuned = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    run(model, tuner, 20, optimizer=optimizer, start=37)
    again, resumed = start(case)
    if case.startswith(("lora", "dora", "id3 on lora")):
        again.load_state_dict(tuned)  # LoRA starts at random; its folder holds what was not chosen
    second = resumed.optimizer(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    resumed.load_state_dict(saved)
    second.load_state_dict(moments)
    run(again, resumed, 20, optimizer=second, start=37)
    assert same(weights(model), weights(again))
    assert resumed.rotation.state() == tuner.rotation.state()
    assert tuner.rotation.probes == (8 if tuner.method.learns else 0)


def test_resume_refuses_what_does_not_fit():
    tuner = attached(adapted(), IST(layers=2))
    state = tuner.state_dict()
    with pytest.raises(ValueError, match="resume: the checkpoint's layers is 2, this run's 3"):
        attached(adapted(), IST(layers=3)).load_state_dict(state)
    with pytest.raises(ValueError, match="says nothing about layers"):
        tuner.load_state_dict(state | {"rotation": None})
    other = state["rotation"] | {"layers": ["a.0", "a.1"]}
    with pytest.raises(ValueError, match=r"the checkpoint has 2 layers, a\.0, a\.1 …; this model 8, base_model"):
        tuner.load_state_dict(state | {"rotation": other})
    method = ID3(budget=0.02, steps=4)
    saved = attached(stack(), RST(layers=2, of=method)).state_dict()
    with pytest.raises(ValueError, match="the checkpoint's layers is 2, this run's 3"):
        attached(stack(), RST(layers=3, of=method)).load_state_dict(saved)


def dropout_of(model):
    return {name: m.training for name, m in model.named_modules() if "lora_dropout.default" in name}


def test_dropout_of_idle_layers_is_off():
    """IST checklist 15: also after `model.train()`; on again when a layer comes back, and after `detach`."""
    model = adapted()
    tuner = attached(model, RST(layers=2))
    optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-2)
    for _ in range(10):
        model.train()
        active = set(tuner.rotation.active)
        model(**tiny.batch(NAME)).loss.backward()
        assert {layer_of(name) for name, on in dropout_of(model).items() if on} == active
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        model(**tiny.batch(NAME))
        assert not any(dropout_of(model).values())
    model.train()
    model(**tiny.batch(NAME))
    tuner.detach()
    assert all(dropout_of(model).values())
    model = adapted()
    attached(model, RST(layers=2, idle_dropout=True))
    model(**tiny.batch(NAME))
    assert all(dropout_of(model).values())


def kept(model):
    """Bytes kept for backward, beside parameters, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**tiny.batch(NAME, rows=4, length=32)).loss  # noqa: B018
    return sum(storage.nbytes() for storage in storages.values())


def test_inputs_and_masks_of_idle_layers_are_not_kept():
    """IST checklist 14 and 15: fp32; what is not kept is at least 0.95 of the inputs and masks of idle layers' adapters.
    Layer 0 is active, so that nothing is saved by a shorter graph.
    """
    config = lora(target_modules=["o_proj", "down_proj"], lora_dropout=0.5)
    plain, model = (adapted(config=copy.deepcopy(config)) for _ in range(2))
    tuner = attached(model, RST(layers=2))
    tuner.rotation.active = [0, 3]
    inputs = 6 * 4 * 32 * (32 + 48) * 4  # layers · tokens · widths · bytes: what dropout gives to lora_A
    assert kept(plain) - kept(model) >= 0.95 * inputs


def flops(model, *, checkpointing=None):
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    counter = FlopCounterMode(display=False)
    with counter:
        model(**tiny.batch(NAME, rows=2, length=32)).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_backward_ends_at_the_lowest_active_layer(checkpointing):
    """IST checklist 16: of the FLOPs of all layers, the top quarter needs ≤ 0.65, and ≤ 0.55 under non-reentrant
    checkpointing; under reentrant checkpointing it trains, and saves nothing.
    """
    plain, model = adapted(16), adapted(16)
    attached(model, RST(layers=0.25, policy="top"))
    share = flops(model, checkpointing=checkpointing) / flops(plain, checkpointing=checkpointing)
    assert share <= {None: 0.65, False: 0.55, True: 1.0}[checkpointing]
    grads = {layer_of(name) for name, p in model.named_parameters() if p.grad is not None}
    assert grads == {12, 13, 14, 15}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_without_checkpointing(checkpointing):
    models = [adapted(4, lora_dropout=0.0, live=True) for _ in range(2)]
    for model in models:
        attached(model, RST(layers=2, seed=1))
    flops(models[0])
    flops(models[1], checkpointing=checkpointing)
    for (name, one), two in zip(models[0].named_parameters(), models[1].parameters(), strict=False):
        assert (one.grad is None) == (two.grad is None), name
        assert one.grad is None or torch.allclose(one.grad, two.grad, atol=1e-7)


def test_what_is_trained_below_the_layers_keeps_its_gradient():
    """The graph is cut only where nothing before it is trained: LISA's embeddings learn, checkpointing or not."""
    for checkpointing in (None, False, True):
        model = stack(4)
        attached(model, LISA(layers=1))
        flops(model, checkpointing=checkpointing)
        assert float(model.model.embed_tokens.weight.grad.abs().sum()) > 0


def test_each_micro_batch_of_an_update_trains_the_same_layers():
    """IST checklist 25: accumulation 4 × rows 4 draws the masks of rows 16."""
    draws = []
    for accumulation in (1, 4):
        model = adapted()
        tuner = attached(model, IST(layers=2, rate=0))
        run(model, tuner, 12, accumulation=accumulation)
        draws.append(tuner.rotation.history["draws"])
    assert draws[0] == draws[1]
    assert len({tuple(layers) for _, layers in draws[0]}) > 3


@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["input_layernorm"]}], ids=["lora", "lora and norms"])
def test_bare_tensors_of_an_adapter_train_as_slots_do(fields):
    """Without a tuner, as a callback does it: the same weights and importance, bit for bit."""
    method = IST(layers=2, interval=3)
    model, bare = adapted(**fields), adapted(**fields)
    tuner = attached(model, method)
    rotation = Rotation(bare, method, Wish(probe=probe()))
    rotation.connect_tensors(bare_tensors(bare))
    optimizer = torch.optim.AdamW([p for p in bare.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    run(model, tuner, 12)
    for step in range(12):
        torch.manual_seed(step)
        update(bare, optimizer, step)
        rotation.after_step(step + 1, optimizer)
    assert same(weights(model), weights(bare))
    assert rotation.state() == tuner.rotation.state()
    rotation.release()
    assert all(tensor.values.requires_grad for tensor in bare_tensors(bare).values())
    assert len(bare_tensors(bare)) == len(list(tuner.slots))


def test_an_encoder_and_a_decoder_train_in_turn():
    """Two stacks, one draw over both; the graph is cut below the decoder only where no encoder layer trains."""
    import transformers as tf

    fields = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "pad_token_id": 0}
    torch.manual_seed(0)
    model = tf.T5ForConditionalGeneration(tf.T5Config(**fields, decoder_start_token_id=0)).train()
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q", "wo"]))
    shake(model)
    tuner = attach(model, RST(layers=2))
    optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-2)
    sides = set()
    for step in range(20):
        before, active = weights(model), set(tuner.rotation.active)
        model(**tiny.batch(NAME, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        prefixes = {tuner.rotation.layers.paths[number] for number in active}
        moved = changed(before, weights(model))
        assert {path for path in tuner.rotation.layers.paths if any(key.startswith(f"{path}.") for key in moved)} == prefixes
        sides |= {tuple(sorted("encoder" in path for path in prefixes))}
    assert sides == {(False, False), (False, True), (True, True)}


def test_adapters_outside_the_stack_train_at_every_update():
    """IST checklist 30: BERT's classifier and pooler; what its user froze stays frozen."""
    model = peft.get_peft_model(tiny.build("bert"), peft.LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS"))
    model.train()
    tuner = attach(model, RST(layers=1))
    outside = set(tuner.rotation.layers.outside)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-2)
    for step in range(6):
        before = weights(model)
        model(**tiny.batch("bert", seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = changed(before, weights(model))
        assert {name for name in outside if "lora_B" in name or "modules_to_save" in name} <= moved
        assert not moved & frozen
    assert any("classifier" in name for name in outside)
    assert any("pooler" in name for name in outside)


def test_detach_leaves_an_ordinary_model():
    model = adapted()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    trainable = [p.requires_grad for p in model.parameters()]
    tuner = attached(model, IST(layers=2, interval=2))
    run(model, tuner, 5)
    assert tuner.detach() is model
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert [p.requires_grad for p in model.parameters()] == trainable
    attached(model, RST(layers=2)).detach()


def test_a_saved_adapter_is_an_ordinary_one(tmp_path):
    model = adapted()
    tuner = attached(model, IST(layers=2, interval=3))
    run(model, tuner, 6)
    tuner.save(tmp_path)
    loaded = peft.PeftModel.from_pretrained(stack(), str(tmp_path)).eval()
    assert torch.equal(loaded(**tiny.batch(NAME)).logits, model.eval()(**tiny.batch(NAME)).logits)


@pytest.mark.parametrize(
    ("build", "method", "message"),
    [
        (stack, RST(), r"RST\(of=None\) trains an adapter's layers, and LlamaForCausalLM has none \(everything in it"),
        (adapted, RST(layers=9), r"RST\.layers=9: the model has 8 layers"),
        (adapted, IST(suppressed=1.0), r"IST\.suppressed=1\.0"),
        (lambda: adapted(layers_to_transform=[3]), RST(layers=1), "no stack of layers found"),
        (tiny.Homemade, RST(of=Full(include=("blocks.0.*",))), "no stack of layers found"),
        (
            lambda: peft.get_peft_model(stack(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
            RST(),
            "RST: PROMPT_TUNING trains a prompt",
        ),
        (
            lambda: peft.get_peft_model(stack(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
            IST(),
            "IST: PREFIX_TUNING trains a prompt",
        ),
        (
            lambda: peft.get_peft_model(
                stack(), peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8)
            ),
            IST(),
            "IST: P_TUNING trains a prompt",
        ),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_no_trace(build, method, message):
    """IST checklist 34, and the issue's bad input."""
    model = build()
    modules, trainable = list(dict(model.named_modules())), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        attached(model, method)
    assert list(dict(model.named_modules())) == modules
    assert [p.requires_grad for p in model.parameters()] == trainable


def test_a_probe_is_asked_for():
    with pytest.raises(ValueError, match="IST: learns from data: give a probe"):
        attach(adapted(), IST())
    model = adapted()
    shake(model)
    assert attach(model, IST(), probe=probe()).rotation.probes == 0


def test_weights_spread_over_processes_are_refused():
    """IST checklist 27: as ZeRO stage 3 marks them; before anything is changed."""
    model = adapted()
    next(model.parameters()).ds_id = 0
    with pytest.raises(ValueError, match=r"embed_tokens.*sharded over processes \(ZeRO\); RST lets layers rest by themselves"):
        attached(model, RST(layers=2))
    assert "intaglio_slots" not in model._modules
