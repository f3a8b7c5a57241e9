"""The continuous batching of transformers, told which request each row belongs to.

Its scheduler and paged cache are used as they are. What is added goes through four seams: the step that runs the model, the
list of logits processors, the router of outputs, and the start and end of the loop. These are internals of transformers
5.23, which the tests hold them to.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol, final

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter
from transformers.generation.continuous_batching.requests import FutureRequestState, GenerationOutput

__all__ = ["Desk", "Manager", "cache_tokens", "settings"]

_PAGE = 16  # tokens per page of the cache
_STEP = 512  # most rows of a step: longer prompts are read in pieces
_CACHE, _CACHED = 2**30, 2**16  # most bytes and tokens of the cache, unless one request of full length needs more


class Desk(Protocol):
    """The keeper of the requests, as the loop sees it; the loop's thread makes all of these calls."""

    def before_step(self) -> None:
        """Between two steps."""

    def run(self, batch: Sequence[tuple[str, int]], step: Callable[[], None]) -> None:
        """Call `step` so that these requests, with as many rows each, find their adapters."""

    def choose(self, id_: str, logits_V: Tensor) -> int:
        """The request's next token."""
        ...

    def deliver(self, output: GenerationOutput) -> None:
        """Take a request's tokens so far, or its end."""

    def ended(self) -> None:
        """The loop is over, for whatever reason."""


@final
class Manager(ContinuousBatchingManager):
    """The loop over the steps, in a thread of its own.

    Args:
        model: the base.
        desk: who knows the requests.
        config: see `settings`.
    """

    def __init__(self, model: Any, desk: Desk, config: ContinuousBatchingConfig) -> None:
        # no processors but ours, whatever the model's own generation config asks for; -1 is no token
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1)
        super().__init__(model, generation, config)
        self._desk = desk
        self.output_router = _Router(desk)
        self.logit_processor.clear()
        self.logit_processor.logits_processor.append(_Choice(desk))  # pyright: ignore[reportArgumentType]
        self.logit_processor.tensors_required, self.logit_processor.do_processing = 1, True

    def start(self) -> None:
        """Start the thread; it does not keep the process alive."""
        device = self.model.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # transformers seeds the whole process
            self.batch_processor = self._create_batch_processor()
        self.background_thread_status.clear()
        self._generation_thread = threading.Thread(target=self._run_generation_loop, name="intaglio-engine", daemon=True)
        self._generation_thread.start()

    @property
    def active(self) -> int:
        """Requests that have been scheduled and are not over."""
        processor = self.batch_processor
        return 0 if processor is None else len(processor.scheduler.active_requests)

    def finish(self, timeout: float) -> None:
        """End the loop: after what is left, or after `timeout` seconds, whatever is left then."""
        thread, status = self._generation_thread, self.background_thread_status
        if thread is None:
            return
        for urgency, patience in ((status.FLUSH_AND_STOP, timeout), (status.HARD_STOP, None)):
            status.request_stop(urgency, self.distributed_helper.global_rank)
            self._wake_up_loop.set()
            thread.join(patience)
            if not thread.is_alive():
                break
        self.stop()  # puts the model's own attention back

    def _run_generation_loop(self) -> None:
        try:
            super()._run_generation_loop()
        finally:
            self._desk.ended()

    def _generation_loop_body(self, batch_processor: Any, bootstrapping: bool) -> bool:
        self._desk.before_step()
        if not batch_processor.scheduler.active_requests:
            # Set where the cache is short, and lifted by transformers when a request finishes, but not when one is cancelled.
            batch_processor.scheduler.block_new_requests = False
        return super()._generation_loop_body(batch_processor, bootstrapping)

    def _generation_step(self) -> None:
        assert self.batch_processor is not None
        held: Any = self.batch_processor.inputs_and_outputs
        step = super()._generation_step

        def run() -> None:
            if held.compute_stream is not None:  # what was placed for this step is placed before it is read
                held.compute_stream.wait_stream(torch.cuda.current_stream(self.model.device))
            step()

        self._desk.run([(r.state.request_id, r.query_length) for r in held.requests_in_batch], run)


@final
class _Choice(ContinuousBatchingLogitsProcessor):
    """Lets each request choose its token: its row becomes one whose greatest entry is that token."""

    def __init__(self, desk: Desk) -> None:
        self.supported_kwargs, self.ignored_kwargs = {}, ()
        self._desk: Desk = desk
        self._rows: list[str] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Tensor:
        self._rows = [request.state.request_id for request in requests_with_new_token]
        return torch.empty(0, dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        for request, logits_V in zip(self._rows, scores, strict=False):  # more rows than requests: those are padding
            logits_V[self._desk.choose(request, logits_V)] = torch.inf
        return scores


@final
class _Router(OutputRouter):
    """Hands every output over at once, in the loop's thread."""

    def __init__(self, desk: Desk) -> None:
        super().__init__()
        self._desk = desk

    def deliver(self, output: GenerationOutput) -> None:
        self._desk.deliver(output)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        for output in outputs:
            self._desk.deliver(output)


def cache_tokens(config: Any, itemsize: int, max_batch: int, max_context: int) -> int:
    """Tokens of keys and values to keep: all that the batch can have, at most 1 GiB; one request always fits."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * head_dim * itemsize
    return max(max_context, min(max_batch * max_context, _CACHE // per_token, _CACHED))


def settings(tokens: int, max_batch: int) -> ContinuousBatchingConfig:
    """How continuous batching is run.

    Blocks are not shared: transformers knows a block by its tokens alone, and would continue one adapter's request from
    the keys and values of another's.

    Args:
        tokens: of the cache, for all requests together.
        max_batch: requests per step.
    """
    return ContinuousBatchingConfig(
        allow_block_sharing=False,
        page_size=_PAGE,
        # each request may leave its last page unfilled
        num_blocks=-(-tokens // _PAGE) + max_batch,
        max_batch_tokens=max(_STEP, max_batch),
        max_requests_per_batch=max_batch,
        max_blocks_per_request=0,
        max_memory_percent=1.0,
        use_async_batching=False,  # a step's tokens are known before the next, so that a cancelled request has none
        use_cuda_graph=None if not torch.cuda.is_available() else False,
        auto_switch_to_flash=False,
    )
