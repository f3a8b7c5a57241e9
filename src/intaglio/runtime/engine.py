"""An engine that generates for many requests at once, each with its own adapter or none: one thread over continuous batching."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, final

from .batching import Manager, cache_tokens, settings
from .mixing import Mixer
from .requests import Event, Requests
from .sampling import Sampling
from .store import AdapterStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Engine", "Event", "Sampling"]

_LONGEST = 8192  # default context, for models whose own is longer


@final
class Engine:
    """An engine that serves requests of many adapters from one base.

    The requests of a step run as one batch. Each has its own sampling, and an error of one ends that one only. What breaks
    the model itself ends the thread: every request gets an error, and `alive` is false from then on.

    Args:
        model: a causal language model of transformers; nobody else may run it meanwhile.
        store: the adapters.
        eos: tokens that end an answer; the one that did is the answer's last token.
        max_batch: most requests that run at once; the others wait. Default 64.
        max_context: most tokens of a request, prompt and answer; default: the model's, at most 8192.
        max_cache_tokens: keys and values to keep for all running requests together; default: what they can need, at most
            1 GiB and 65,536 tokens. Where it is short, requests wait.

    Raises:
        ValueError: for a number out of range, or a model that continuous batching cannot run.

    Example:
        >>> engine = Engine(model, AdapterStore(model), eos=[tokenizer.eos_token_id])
        >>> engine.start()
        >>> engine.submit(tokenizer("Hello")["input_ids"], Sampling(max_tokens=20, temperature=0), print)
        '0'
    """

    def __init__(
        self,
        model: PreTrainedModel,
        store: AdapterStore,
        *,
        eos: Collection[int],
        max_batch: int = 64,
        max_context: int | None = None,
        max_cache_tokens: int | None = None,
    ) -> None:
        config = model.config.get_text_config()
        longest = getattr(config, "max_position_embeddings", _LONGEST)
        self.max_context = max_context or min(longest, _LONGEST)
        tokens = max_cache_tokens or cache_tokens(config, model.dtype.itemsize, max_batch, self.max_context)
        _check(max_batch, self.max_context, longest, tokens)
        self.store, self._eos = store, list(eos)
        embeddings: Any = model.get_input_embeddings()
        self._vocabulary: int = embeddings.num_embeddings
        self._mixer = Mixer(model, store.layers)
        self._requests = Requests(store, self._mixer, frozenset(eos), lambda id_: self._manager.cancel_request(id_))
        self._manager = Manager(model, self._requests, settings(tokens, max_batch))

    def start(self) -> None:
        """Start the thread. An engine that has stopped cannot be started again."""
        self._manager.start()

    def stop(self, timeout: float = 30.0) -> None:
        """Take no more requests, let those that are there end, then end the thread.

        Args:
            timeout: seconds after which what still runs ends with an error; default 30.
        """
        self._requests.close()
        self._manager.finish(timeout)
        self._mixer.remove()

    @property
    def alive(self) -> bool:
        """Whether the thread runs and has not failed."""
        return self._manager.is_running() and self._manager.background_thread_status.fatal_error is None

    @property
    def running(self) -> int:
        """Requests that are being generated."""
        return min(self._manager.active, len(self._requests))

    @property
    def waiting(self) -> int:
        """Requests that no step has taken up yet."""
        return max(0, len(self._requests) - self._manager.active)

    def submit(
        self, prompt: Sequence[int], sampling: Sampling, deliver: Callable[[Event], None], adapter: str | None = None
    ) -> str:
        """Queue a request.

        Args:
            prompt: token ids, at least one.
            sampling: how its tokens are chosen, and how many.
            deliver: called with every event, in order, from the engine's thread, which waits for it: hand over and return.
                A request whose `deliver` raises is cancelled.
            adapter: its name in the store; default None, the base.

        Returns:
            The request's id, for `cancel`.

        Raises:
            UnknownAdapter: where no such adapter is loaded.
            ValueError: for an empty or too long prompt, or an id that is no token of the model's.
            RuntimeError: where the engine does not run.
        """
        self._check_prompt(prompt, sampling)
        tokens = list(prompt)

        def queue(id_: str) -> None:
            self._manager.add_request(tokens, id_, sampling.max_tokens, streaming=True, eos_token_id=self._eos)

        taken = self._requests.add(sampling, deliver, adapter, queue) if self.alive else None
        if taken is None:
            raise RuntimeError("the engine does not run: it was not started, was stopped, or has failed")
        return taken

    def cancel(self, request: str) -> None:
        """End a request; its last event says "cancelled". One that is over already is left alone."""
        self._requests.cancel(request)

    def _check_prompt(self, prompt: Sequence[int], sampling: Sampling) -> None:
        if not prompt:
            raise ValueError("prompt: empty; give at least one token")
        if len(prompt) + sampling.max_tokens > self.max_context:
            raise ValueError(
                f"prompt: {len(prompt)} tokens and max_tokens={sampling.max_tokens} are more than the context of "
                f"{self.max_context} tokens; shorten the prompt or ask for fewer"
            )
        if min(prompt) < 0 or max(prompt) >= self._vocabulary:
            raise ValueError(f"prompt: token ids must lie in [0, {self._vocabulary}), found {min(prompt)} … {max(prompt)}")


def _check(max_batch: int, max_context: int, longest: int, tokens: int) -> None:
    if max_batch < 1:
        raise ValueError(f"max_batch={max_batch}: give at least 1")
    if not 2 <= max_context <= longest:
        raise ValueError(f"max_context={max_context}: give 2 to {longest}, the longest context of this model")
    if tokens < max_context:
        raise ValueError(f"max_cache_tokens={tokens}: one request of max_context={max_context} tokens would not fit")
