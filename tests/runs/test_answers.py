import pytest
import torch
import transformers as tf

from intaglio.runs.answers import evaluate, is_lenient_match, wilson
from intaglio.runs.config import EvaluateBlock
from intaglio.runs.generate import generate_answers
from support import tiny


@pytest.fixture(scope="module")
def model_and_tokenizer(tmp_path_factory):
    folder = tiny.save_folder(tmp_path_factory.mktemp("model"))
    return tf.AutoModelForCausalLM.from_pretrained(folder), tf.AutoTokenizer.from_pretrained(folder)


PROMPTS = ["a", "a longer prompt", "b c", "the quick brown fox jumps", "zz"]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batched_generation_equals_a_plain_greedy_loop(model_and_tokenizer, batch_size):
    """Left padding, sorting by length and batching change no answer."""
    model, tokenizer = model_and_tokenizer
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)["input_ids"]
        start = ids.shape[1]
        for _ in range(8):
            following = model(ids).logits[0, -1].argmax()
            if following == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, following[None, None]], dim=1)
        expected.append((tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip(), ids.shape[1] - start == 8))
    assert generate_answers(model, tokenizer, PROMPTS, batch_size=batch_size, max_new_tokens=8) == expected
    assert len(set(expected)) > 1


def test_conversations_go_through_the_chat_template(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    message = [{"role": "user", "content": "hi"}]
    plain = "<s>user: hi</s><s>assistant: "
    with_template = generate_answers(model, tokenizer, [message], max_new_tokens=6)
    assert with_template == generate_answers(model, tokenizer, [plain], max_new_tokens=6)


def test_generation_leaves_mode_and_tokenizer_alone(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    model.train()
    before = tokenizer.padding_side
    generate_answers(model, tokenizer, PROMPTS, max_new_tokens=1)
    assert model.training
    assert tokenizer.padding_side == before


def test_counts(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    outputs = [output.text for output in generate_answers(model, tokenizer, PROMPTS, max_new_tokens=8)]
    rows = [{"prompt": p, "answer": o if i < 3 else "\0"} for i, (p, o) in enumerate(zip(PROMPTS, outputs, strict=True))]
    score, records = evaluate(model, tokenizer, rows, EvaluateBlock.model_validate({"max_new_tokens": 8}))
    assert (score.total, score.correct, score.exact) == (5, 3, 3)
    assert [r["correct"] for r in records] == [True] * 3 + [False] * 2
    task, _ = evaluate(model, tokenizer, rows, EvaluateBlock.model_validate({"limit": 4}), verify=lambda a, r: 1.0)
    assert (task.total, task.correct, task.lenient) == (4, 4, 4)
    block = EvaluateBlock.model_validate({"match": "exact", "max_new_tokens": 8})
    assert evaluate(model, tokenizer, rows, block, verify=lambda a, r: 1.0)[0].correct == 3
    with pytest.raises(ValueError, match="no held-out rows"):
        evaluate(model, tokenizer, [], EvaluateBlock.model_validate({}))


@pytest.mark.parametrize(
    ("answer", "output", "found"),
    [
        ("5", "The answer is 5.", True),
        ("5", "5", True),
        ("5", "15", False),
        ("5", "5.2", False),
        ("5", "-5", False),
        ("-5", "it is -5!", True),
        ("true", "The correct answer is True.", True),
        ("true", "untrue", False),
        ("7", "3 + 4 = 7", True),
    ],
)
def test_lenient(answer, output, found):
    assert is_lenient_match(answer, output) is found


def test_extract_takes_the_last_match(model_and_tokenizer):
    from intaglio.runs.answers import _extract

    assert _extract(r"-?\d+", "1 then 22 then 3") == "3"
    assert _extract(r"#### (\S+)", "x #### 42") == "42"
    assert _extract(r"\d", "none") == ""


def test_extract_reads_the_reference_too(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    block = EvaluateBlock.model_validate({"extract": "[^ ]", "max_new_tokens": 8})
    output = generate_answers(model, tokenizer, PROMPTS[:1], max_new_tokens=8)[0].text
    rows = [{"prompt": PROMPTS[0], "answer": "a long solution " + output.replace(" ", "")[-1]}]
    assert evaluate(model, tokenizer, rows, block)[0].correct == 1


@pytest.mark.parametrize("hits", [0, 1, 199, 200])
def test_every_score_can_be_drawn(hits, tmp_path):
    from intaglio.report.plots import plot_accuracy
    from intaglio.runs.answers import Score

    low, high = wilson(hits, 200)
    score = Score(total=200, correct=hits, exact=hits, lenient=hits, low=low, high=high).to_dict()
    assert low <= hits / 200 <= high
    assert plot_accuracy(score, score, tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [(0, 200, 0.0, 0.0188), (100, 200, 0.4313, 0.5687), (148, 200, 0.6749, 0.7959), (10, 10, 0.7225, 1.0)],
)
def test_wilson_interval(hits, total, low, high):
    """Against the published table values of the Wilson score interval (R: prop.test(correct = FALSE))."""
    assert wilson(hits, total) == pytest.approx((low, high), abs=2e-4)


def test_outputs_that_were_cut_are_counted_and_no_skill_is_told_from_them(model_and_tokenizer):
    from intaglio.report.tables import _gain

    model, tokenizer = model_and_tokenizer
    rows = [{"prompt": prompt, "answer": "x"} for prompt in PROMPTS]
    short = evaluate(model, tokenizer, rows, EvaluateBlock.model_validate({"max_new_tokens": 1}))[0].to_dict()
    ended = [output.is_cut for output in generate_answers(model, tokenizer, PROMPTS, max_new_tokens=1)]
    assert short["cut"] == sum(ended) > 0
    told = dict(_gain(short, short))
    assert f"{short['cut']} of 5 outputs of the base were cut" in told["  of it skill"]
    assert "right where the base is wrong" in dict(_gain(short | {"cut": 0}, short))["  of it skill"]
