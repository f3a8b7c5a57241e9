"""Keys, names, folders, places and bodies, each by itself."""

import os

import pytest
from pydantic import ValidationError

from intaglio.adapter.names import check_name
from intaglio.serve.errors import ApiError
from intaglio.serve.limits import Admission, Keys, confined
from intaglio.serve.protocol import ChatRequest, CompletionRequest, LoadRequest


def test_keys():
    keys = Keys(["one", "zwei-2"])
    assert keys.needed
    assert all(keys.open(header) for header in ("Bearer one", "bearer zwei-2", "Bearer  one "))
    assert not any(keys.open(header) for header in ("", "Bearer", "Bearer ", "one", "Basic one", "Bearer on", "Bearer \ud800"))
    assert Keys().open("")
    assert not Keys().needed
    with pytest.raises(ValueError, match="empty key"):
        Keys(["one", " "])


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../a", "a b", "ä", "a\n", "a" * 129, "a\\b", "a=b", "\0", "..a", "-a", ":a"]
)
def test_names_that_are_refused(name):
    with pytest.raises(ValueError, match="adapter name"):
        check_name(name)


@pytest.mark.parametrize("name", ["a", "user-7_v1.2:x", "a" * 128, "_x", "a..b"])
def test_names_that_are_taken(name):
    assert check_name(name) == name


@pytest.fixture
def place(tmp_path):
    root = tmp_path / "root"
    for folder in (root / "good", root / "deep/er", tmp_path / "secret", tmp_path / "root-2"):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
    (root / "linked").symlink_to(tmp_path / "secret")
    (root / "inside").symlink_to(root / "good")
    (root / "circle").symlink_to(root / "circle")
    (root / "file").write_text("")
    (root / "partly").mkdir()
    (root / "partly/adapter_config.json").symlink_to(tmp_path / "secret/adapter_config.json")
    return root


def test_folders_inside_the_root(place):
    assert confined(place, "good") == place / "good"
    assert confined(place, "./deep/../deep/er") == place / "deep/er"
    assert confined(place, str(place / "good")) == place / "good"
    assert confined(place, "inside") == place / "good"
    os.symlink(place, place.parent / "door")
    assert confined(place.parent / "door", "good") == place / "good"


OUTSIDE = [
    "..",
    "../secret",
    "good/../../secret",
    "/",
    "/etc",
    "/nowhere",
    "../root-2",
    "../nowhere",
    "nowhere",
    "linked",
    "circle",
    "file",
    "partly",
    "\0",
    "a" * 5000,
    "linked/..",
    "~",
]


@pytest.mark.parametrize("path", OUTSIDE)
def test_folders_out_of_reach(place, path):
    with pytest.raises(ApiError, match="inside the server's adapter root") as refused:
        confined(place, path)
    assert refused.value.status == 400
    assert str(place) not in str(refused.value)


def test_places():
    admission = Admission(2)
    with admission.place():
        with admission.place(), pytest.raises(ApiError, match="too many") as refused, admission.place():
            pass
        assert (refused.value.status, refused.value.retry_after) == (429, 1)
        assert admission.taken == 1
        admission.closed = True
        with pytest.raises(ApiError, match="shutting down") as refused, admission.place():
            pass
        assert refused.value.status == 503
    assert admission.taken == 0


def chat(**fields):
    return ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields})


def test_what_openais_client_sends_by_default_is_taken():
    request = chat(
        n=1,
        user="me",
        stop="x",
        presence_penalty=0,
        frequency_penalty=0.0,
        logprobs=False,
        tools=None,
        logit_bias={},
        response_format={"type": "text"},
        max_completion_tokens=7,
        max_tokens=None,
        stream_options={"include_usage": True},
        metadata={"a": "b"},
        store=False,
        tool_choice="none",
    )
    assert request.stop == ["x"]
    assert request.longest == 7
    assert request.stream_options.include_usage
    echoed = {"role": "assistant", "content": "said", "refusal": None, "tool_calls": None, "annotations": None}
    parts = {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    turns = [message.turn for message in chat(messages=[echoed, parts]).messages]
    assert turns == [{"role": "assistant", "content": "said"}, {"role": "system", "content": "ab"}]
    for prompt, found in (("x", "x"), (["x"], "x"), ([1, 2], [1, 2]), ([[1, 2]], [1, 2])):
        assert CompletionRequest.model_validate({"model": "m", "prompt": prompt}).prompt == found


REFUSED = {
    "n": 2,
    "logprobs": True,
    "presence_penalty": 0.5,
    "tools": [{"type": "function"}],
    "response_format": {"type": "json_object"},
    "temperature": -1,
    "top_p": 0,
    "top_k": -2,
    "max_tokens": 0,
    "max_completion_tokens": -1,
    "seed": 2**63,
    "stop": ["x"] * 17,
    "stream": "yes",
    "messages": [],
    "model": "",
    "surprise": 1,
    "stream_options": {"surprise": 1},
}
VALUES = [
    ("temperature", 2.1),
    ("temperature", 0.001),
    ("temperature", float("nan")),
    ("temperature", "1"),
    ("temperature", True),
    ("max_tokens", 1.5),
    ("stop", [""]),
    ("stop", [1]),
    ("seed", 1.0),
    ("messages", [{"role": "tool", "content": ""}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
    ("messages", [{"role": "user"}]),
    ("messages", "hi"),
    ("model", "m" * 513),
]


@pytest.mark.parametrize(("field", "value"), [*REFUSED.items(), *VALUES])
def test_bodies_that_are_refused_name_the_field(field, value):
    with pytest.raises(ValidationError) as refused:
        chat(**{field: value})
    first = refused.value.errors()[0]
    assert field in first["loc"] or field in first["msg"]


@pytest.mark.parametrize("prompt", ["\ud800", ["\udfff"], ["a", "b"], [[1], [2]], [1, "a"], [1.5], None, 7, [True]])
def test_prompts_that_are_refused(prompt):
    with pytest.raises(ValidationError):
        CompletionRequest.model_validate({"model": "m", "prompt": prompt})


def test_logprobs_of_nought_are_asked_for():
    """For completions 0 asks for those of the chosen tokens."""
    with pytest.raises(ValueError, match="logprobs"):
        CompletionRequest(model="m", prompt="p", logprobs=0)
    assert CompletionRequest(model="m", prompt="p", logprobs=False).usual == 16


@pytest.mark.parametrize("key", [" padded", "schlüssel", "two\nlines"])
def test_keys_that_no_caller_could_send(key):
    with pytest.raises(ValueError, match="no caller could send"):
        Keys([key])


def test_vllms_bodies():
    assert LoadRequest.model_validate({"lora_name": "a", "lora_path": "b", "load_inplace": False}).lora_name == "a"
    for wrong in (
        {"lora_name": "a"},
        {"lora_name": "", "lora_path": "b"},
        {"lora_name": "a", "lora_path": "b", "load_inplace": True},
    ):
        with pytest.raises(ValidationError):
            LoadRequest.model_validate(wrong)


def test_an_error_can_be_encoded_whatever_was_sent():
    body = ApiError(400, "half a pair \ud800 " + "x" * 5000, param="\udfff" * 500).body["error"]
    assert len(body["message"].encode()) <= 1000
    assert len(body["param"].encode()) <= 100
    assert (body["type"], body["code"]) == ("invalid_request_error", None)
