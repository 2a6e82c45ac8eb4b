"""A Hugging Face model, unmodified, whose keys and values live in pages."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from quire.debug import debug_enabled
from quire.errors import ArgumentError, ShapeError, UnsupportedError
from quire.hf import limits, linear
from quire.hf.admit import guard
from quire.hf.admit.rehearsal import Stage
from quire.hf.attention import RunningStep
from quire.hf.cache import PagedCache, PageLayout, make_swap, pages_within
from quire.hf.checkpoint import find_checkpoint
from quire.hf.forward import PackedForward
from quire.hf.graphs import DecodeGraphs, wants_graphs
from quire.hf.load import load_checkpoint
from quire.hf.planners import Planners
from quire.hf.step import Step
from quire.hf.transfer import StreamTurns
from quire.kernels import ahead, resolve_backend
from quire.ops.warm_up import compile_jobs
from quire.pages import PageAllocator, PrefixCache, Swap
from quire.pages.huge_pages import collapse_to_huge_pages
from quire.spec import AttentionSpec, KVDtype, check_bytes, check_size

DEFAULT_CPU_POOL_BYTES = 1 << 30
DEFAULT_GPU_POOL_SHARE = 0.8  # of what the weights leave free; the rest is for activations


class PagedModel:
    """Runs packed steps through a decoder-only model of transformers, attention on pages.

    Outside `forward` the model is the ordinary model it was. During `forward` its config names another attention and
    its layers have other forwards (switches.py), so `forward` may be called from any number of threads, which take
    turns by `lock`; whoever calls the model itself beside them holds `lock` meanwhile.

    Args:
        model: any decoder-only causal language model, in eval mode, on one device.
        page_size: tokens per page.
        num_pages: pages of the pool, of bytes_per_page each. Give this or memory_bytes; with neither, the pool takes
            1 GiB on a CPU and 80 % of the free memory on a GPU.
        memory_bytes: take as many pages as fit.
        kv_dtype: None keeps pages in the model's dtype; "int8", "fp8_e4m3", "fp8_e5m2" quantise them.
        max_model_len: most tokens of a sequence, prompt and generated; None: as many as the config allows, which it
            must not exceed.
        backend: "auto", "cpu", "triton" or "reference".
        compile: run the model's layers compiled by torch, which takes a C++ compiler and, once, the time to
            compile; see docs/experiments.md for what both come to.
        cuda_graphs: replay recorded launches in steps of one token per sequence, so that the host does not hold up the
            GPU. None: on a GPU wherever the model can be recorded; why it cannot is logged by the logger "quire". With
            QUIRE_DEBUG=1 none is. A graph reads weights where they were: change them in place.
        batch_invariant: a token's logits have the same bits whatever else is in its steps, however its sequence was
            divided into them, and wherever its earlier keys come from; see docs/numerics.md for how, and at what cost.
        swap_bytes: host memory for copies of pages that the pool has no room for, in whole pages; pinned if the pool is
            on a GPU. 0: none.
    Attributes:
        groups: what the layers of each page table see. Most models have one page table; where some layers see fewer
            tokens than others, groups of equally many layers have one each, and a token lies on a page of each group.
        bytes_per_page: bytes of a page, in all layers of its group together.
        allocator: the one allocator of the pool's pages, for all who run steps on them.
        prefix_cache: which pages hold the beginning of which texts, for all engines on this model. Call
            `Engine.reset_prefix_cache` after the weights were changed in place: it cannot see that.
        batch_invariant: as given.
        graphs: the recorded graphs, with the memory that they hold; None where there are none.
        swap: the copies in host memory, for all engines on this model; None with swap_bytes=0.
        max_seq_len: most tokens of a sequence; None: no limit.
        lock: an RLock, the same for every PagedModel of this transformers model, and of models that share its configs,
            linear layers or decoder.
    Raises:
        UnsupportedError: the model would not compute the same on pages, or cannot be compiled or made batch-invariant
            as asked; the sentence says why (see guard.py, compiled.py, invariant.py).
        ArgumentError: sizes that do not fit, both num_pages and memory_bytes, or a switch that is no bool.
    Cost: eight forwards of at most 70 tokens to check the model, nine more if it is to be batch-invariant, and the
        pool; on the CPU the weights are moved into huge pages, at about 1 GB/s, and kernels that are not on disk yet
        are compiled (see ``quire.warm_up``).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        page_size: int = 16,
        num_pages: int | None = None,
        memory_bytes: int | None = None,
        kv_dtype: KVDtype | None = None,
        max_model_len: int | None = None,
        backend: str = "auto",
        compile: bool = False,
        cuda_graphs: bool | None = None,
        batch_invariant: bool = False,
        swap_bytes: int = 0,
    ) -> None:
        swap_bytes = _check_swap_bytes(swap_bytes)
        if num_pages is not None and memory_bytes is not None:
            raise ArgumentError(
                f"only one of num_pages and memory_bytes may be given; got {num_pages} and {memory_bytes}. "
                "Fix: leave one of them None"
            )
        check_size("page_size", page_size)
        if num_pages is not None:
            check_size("num_pages", num_pages)
        if memory_bytes is not None:
            memory_bytes = check_bytes("memory_bytes", memory_bytes)
        _check_batch_invariant(batch_invariant, compile)
        max_seq_len = limits.max_seq_len(model.config, at_most=max_model_len)
        takes_graphs = wants_graphs(cuda_graphs, resolve_backend(backend, model.device), model.device)
        guard.check_config(model)
        self._forward = PackedForward(model, compile=compile, batch_invariant=batch_invariant)
        calls = guard.layer_calls(model, self._forward)
        shapes = guard.layer_shapes(model, calls)
        specs = {shape.spec(page_size, kv_dtype) for shape in shapes.values()}
        _compile_kernels(model, specs, backend, batch_invariant)
        layout = PageLayout(shapes, page_size=page_size, kv_dtype=kv_dtype)
        self.groups = tuple(group.visibility for group in layout.groups)
        self.bytes_per_page = layout.bytes_per_page
        stage = Stage(self._forward, calls, shapes, page_size, kv_dtype, backend, batch_invariant)
        if batch_invariant:
            guard.keep_bits(model, stage)
        guard.rehearse(model, stage)

        self.model = model
        self.page_size = page_size
        if num_pages is None:
            budget = _default_pool_bytes(model.device) if memory_bytes is None else memory_bytes
            num_pages = pages_within(budget, self.bytes_per_page)
        self.max_seq_len = max_seq_len
        self.batch_invariant = batch_invariant
        self._planners = Planners(backend, model.device, batch_invariant)
        if resolve_backend(backend, model.device) == "cpu":
            collapse_to_huge_pages(model.parameters())
        self._cache = PagedCache(shapes, layout, num_pages=num_pages, device=model.device)
        # One per pool: every engine on this model draws from it.
        self.allocator = PageAllocator(num_pages, on_drop=self.poison if debug_enabled() else None)
        self.prefix_cache = PrefixCache(self.allocator, page_size, self.groups)
        self.swap: Swap | None = (
            make_swap(self.prefix_cache, self._cache.pools, swap_bytes) if swap_bytes else None
        )
        self.lock = self._forward.switches.lock
        self._streams = StreamTurns(model.device)
        self._must_record = bool(cuda_graphs)
        self.graphs: DecodeGraphs | None = None
        if takes_graphs:
            self.graphs = DecodeGraphs(self._forward, self._cache, self._planners, self._longest_sequence())
            try:
                self.graphs.record(1)
            except UnsupportedError as error:
                self._run_without_graphs(error)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        page_size: int = 16,
        num_pages: int | None = None,
        memory_bytes: int | None = None,
        kv_dtype: KVDtype | None = None,
        max_model_len: int | None = None,
        backend: str = "auto",
        compile: bool = False,
        cuda_graphs: bool | None = None,
        batch_invariant: bool = False,
        swap_bytes: int = 0,
    ) -> PagedModel:
        """Load a folder in the Hugging Face format, config.json and *.safetensors, or a model of the hub by its id.

        Nothing of a folder is downloaded, and no code of either is run.

        Args:
            path, revision: see ``find_checkpoint``.
            dtype, device: see ``load_checkpoint``.
        Raises:
            ModelError: no usable model is there.
            DeviceError: this torch or machine has no such device.
            UnsupportedError, ArgumentError: as for PagedModel.
        """
        return cls(
            load_checkpoint(find_checkpoint(path, revision), dtype, device),
            page_size=page_size,
            num_pages=num_pages,
            memory_bytes=memory_bytes,
            kv_dtype=kv_dtype,
            max_model_len=max_model_len,
            backend=backend,
            compile=compile,
            cuda_graphs=cuda_graphs,
            batch_invariant=batch_invariant,
            swap_bytes=swap_bytes,
        )

    def forward(self, step: Step, input_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Run one packed step: write its keys and values into their slots, attend, return the wanted logits.

        Args:
            step: the new tokens of any number of sequences; prefills, chunks and decodes may be mixed.
            input_ids: int64 [tokens] on the model's device, in place of step.input_ids: tokens that the step before has
                chosen, and that have not reached the host. They are not checked.
        Returns:
            float32 [rows, vocab_size], a row per entry of step.logits_indices, in its order.
        Raises:
            ArgumentError: a token outside the vocabulary, a position past max_seq_len, or a slot outside the pool;
                nothing was written.
            ShapeError: the step was built for another number of page tables; nothing was written.
        Cost: one forward of step.num_tokens tokens; the head runs on the wanted rows only.
        """
        step.check_fits(self.vocab_size, self.max_seq_len, self.num_pages * self.page_size)
        if step.num_groups != len(self.groups):
            raise ShapeError(
                f"page_table must hold {len(self.groups)} page tables, one for each group of this model's layers; got "
                f"{list(step.page_table.shape)}. Fix: PageTable(allocator, page_size, model.groups)"
            )
        with self.lock:
            self._streams.take()
            if self.graphs is not None and self.graphs.serves(step):
                try:
                    return self.graphs.run(step, input_ids)
                except UnsupportedError as error:
                    self._run_without_graphs(error)
            return self._forward.paged(RunningStep(step, self._cache, self._planners), input_ids)

    @property
    def runs_ahead(self) -> bool:
        """Whether a step may be handed over before the one before it has ended: where the host only launches it."""
        return self.device.type == "cuda"

    def _run_without_graphs(self, error: UnsupportedError) -> None:
        """From now on, unless they were asked for."""
        if self._must_record:
            raise error
        logging.getLogger("quire").warning("decode steps run without CUDA graphs: %s", error)
        self.graphs = None

    def _longest_sequence(self) -> int:
        """Most tokens that a sequence can have: the model's limit, or what the pool holds."""
        in_pool = self.num_pages * self.page_size
        return in_pool if self.max_seq_len is None else min(in_pool, self.max_seq_len)

    def copy_pages(self, copies: Iterable[tuple[int, int]]) -> None:
        """Copy whole pages, in every layer of their group (copy-on-write); (source, destination) pairs, in order."""
        with self.lock:
            self._streams.take()
            self._cache.copy_pages(copies)

    def poison(self, pages: Iterable[int]) -> None:
        """Fill pages with NaN, in every layer of their group, so that a read of what nobody owns shows (debugging)."""
        self._cache.poison(pages)

    @property
    def num_pages(self) -> int:
        """Pages of the pool; page ids run from 0 to num_pages − 1."""
        return self._cache.num_pages

    @property
    def config(self) -> PretrainedConfig:
        """The model's config."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where weights and pages live."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def vocab_size(self) -> int:
        """Token ids run from 0 to vocab_size − 1."""
        return int(self.config.get_text_config(decoder=True).vocab_size)

    @property
    def generation_config(self) -> GenerationConfig | None:
        """How the model's authors mean its tokens to be chosen; None where the model says nothing."""
        return getattr(self.model, "generation_config", None)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text; empty where the model names none."""
        named = getattr(self.generation_config, "eos_token_id", None)
        if named is None:
            named = getattr(self.config.get_text_config(decoder=True), "eos_token_id", None)
        if named is None:
            return ()
        return tuple(named) if isinstance(named, (list, tuple)) else (int(named),)

    def __repr__(self) -> str:
        return (
            f"PagedModel({type(self.model).__name__}, {str(self.dtype).removeprefix('torch.')} on {self.device}, "
            f"page_size={self.page_size}, {self.num_pages * self.bytes_per_page / 1e6:.1f} MB of pages, "
            f"{self.allocator!r}{'' if self.swap is None else f', {self.swap!r}'})"
        )


def _compile_kernels(
    model: PreTrainedModel, specs: Iterable[AttentionSpec], backend: str, batch_invariant: bool
) -> None:
    """All that steps of this model run, before the first of them."""
    jobs = compile_jobs(specs, backend, model.device)
    if batch_invariant and model.device.type == "cpu":
        jobs += linear.compile_jobs_of_any(model)
    elif resolve_backend(backend, model.device) == "cpu":
        jobs += linear.compile_jobs(model)
    ahead.compile_ahead(jobs)


def _check_batch_invariant(batch_invariant: object, compile: bool) -> None:
    if not isinstance(batch_invariant, bool):
        raise ArgumentError(
            f"batch_invariant must be a bool; got {batch_invariant!r}. Fix: batch_invariant=True"
        )
    if batch_invariant and compile:
        raise UnsupportedError(
            "a batch-invariant model must run operator by operator, as a compiler chooses the order of sums itself; "
            "got compile=True. Fix: compile=False"
        )


def _check_swap_bytes(swap_bytes: int) -> int:
    swap_bytes = check_bytes("swap_bytes", swap_bytes)
    if swap_bytes < 0:
        raise ArgumentError(f"swap_bytes must be 0 or more; got {swap_bytes}. Fix: swap_bytes=0 for none")
    return swap_bytes


def _default_pool_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * DEFAULT_GPU_POOL_SHARE)
    return DEFAULT_CPU_POOL_BYTES
