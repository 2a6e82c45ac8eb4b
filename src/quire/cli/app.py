"""Commands and options, as typed. Importing this loads no model library: `--help` answers at once."""

from __future__ import annotations

import sys
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from quire.engine import LLM

app = typer.Typer(
    name="quire",
    help="PagedAttention for PyTorch: language models whose KV cache lives in pages.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Dtype(str, Enum):
    """Dtypes of weights and activations."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class KVDtypeName(str, Enum):
    """Dtypes of quantised pages."""

    int8 = "int8"
    fp8_e4m3 = "fp8_e4m3"
    fp8_e5m2 = "fp8_e5m2"


class CacheDtype(str, Enum):
    """The same, as vLLM names them."""

    auto = "auto"
    int8 = "int8"
    fp8 = "fp8"
    fp8_e4m3 = "fp8_e4m3"
    fp8_e5m2 = "fp8_e5m2"


MODEL_HELP = (
    "A Hugging Face model folder, or a model's id on the hub, such as Qwen/Qwen3-0.6B, which is downloaded once; a "
    "folder of that name wins."
)
# Typer reads annotations at run time, and Python 3.10's typer has no `X | None` in all versions we allow.
ModelOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--model",
        metavar="MODEL",
        help=f"{MODEL_HELP} Default: the embedded demo model.",
    ),
]
RevisionOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--revision", help="Branch, tag or commit of a model's id.", show_default="main"),
]
DtypeOption = Annotated[Dtype, typer.Option(help="Dtype of the weights; auto: what the checkpoint says.")]
DeviceOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="Where the model runs: cpu, cuda, cuda:1 …", show_default="cuda if there is a GPU, else cpu"
    ),
]
TemperatureOption = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(
        help="0 takes the likeliest token; above 0 draws, the higher the wilder.",
        show_default="the model's, or 0",
    ),
]
TopPOption = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(
        help="Draw from the likeliest tokens that together have this probability.",
        show_default="the model's, or 1",
    ),
]
TopKOption = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="Draw from the k likeliest tokens; 0: from all.", show_default="the model's, or all"),
]
SeedOption = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="Repeat the same draws.", show_default="random"),
]
KVDtypeOption = Annotated[
    Optional[KVDtypeName],  # noqa: UP045
    typer.Option("--kv-dtype", help="Quantise the pages; default: pages in the dtype of the weights."),
]
PageSizeOption = Annotated[int, typer.Option(min=1, help="Tokens per page.")]
NumPagesOption = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--num-pages", min=1, help="Pages of the pool."),
]
TraceOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--trace",
        metavar="FILE",
        help="Write what each step does to a file, for ui.perfetto.dev and [bold]quire pages[/bold].",
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        from quire import __version__

        typer.echo(f"quire {__version__}")
        raise typer.Exit


@app.callback()
def quire(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """PagedAttention for PyTorch: language models whose KV cache lives in pages.

    [bold]quire demo[/bold] shows it at work, offline; [bold]quire doctor[/bold] says what this machine has.
    """
    from quire.cli.console import hush

    hush()


def _load(
    model: str | None, revision: str | None, dtype: Dtype, device: str | None, kv_dtype: KVDtypeName | None,
    page_size: int, num_pages: int | None,
) -> LLM:  # fmt: skip
    """The model of these options."""
    from quire.cli.model import load

    kv = kv_dtype.value if kv_dtype else None
    return load(
        model,
        revision=revision,
        dtype=dtype.value,
        device=device,
        kv_dtype=kv,
        page_size=page_size,
        num_pages=num_pages,
    )


@app.command()
def generate(
    prompt: Annotated[
        str, typer.Argument(help="Text to continue; - reads it from standard input.", show_default=False)
    ],
    max_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Most tokens to generate.", show_default="the model's, or 128"),
    ] = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    seed: SeedOption = None,
    stop: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="End the text before this string; may be given several times."),
    ] = None,
    model: ModelOption = None,
    revision: RevisionOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    kv_dtype: KVDtypeOption = None,
    page_size: PageSizeOption = 16,
    num_pages: NumPagesOption = None,
    trace: TraceOption = None,
) -> None:
    """Continue a text with a language model on pages.

    The text streams as it comes. Into a pipe or a file goes the new text alone, without the prompt.

    \b
    Examples:
      quire generate "def fibonacci(n):"
      quire generate "class Stack:" --max-tokens 200 --temperature 0.8 --seed 1
      quire generate "import os" --model ~/models/SmolLM2-135M --kv-dtype int8
      quire generate "Once upon a time" --model Qwen/Qwen3-0.6B --device cpu --dtype bfloat16
      cat start.py | quire generate - --stop "class " > rest.py
    """
    from quire.cli.generate import run
    from quire.cli.model import check_trace, sampling, tracing

    check_trace(trace)
    params = sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, max_tokens=max_tokens, stop=stop or None
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    llm = _load(model, revision, dtype, device, kv_dtype, page_size, num_pages)
    with tracing(llm, trace):
        run(llm, text, params)


@app.command()
def chat(
    model: Annotated[
        str,
        typer.Argument(
            help=f"{MODEL_HELP} Its tokenizer must have a chat template.",
            show_default=False,
        ),
    ],
    system: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="What the model is told before the conversation.", show_default="nothing"),
    ] = None,
    max_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Most tokens of an answer.", show_default="as many as fit"),
    ] = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    seed: SeedOption = None,
    revision: RevisionOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    kv_dtype: KVDtypeOption = None,
    page_size: PageSizeOption = 16,
    num_pages: NumPagesOption = None,
) -> None:
    """Talk to a model, line by line.

    Answers stream as they come, and the model sees the whole conversation, which stays in pages from turn to turn.
    Ctrl-C stops an answer, /clear forgets the conversation, /exit or Ctrl-D ends. Lines may come through a pipe:
    then the answers alone are written.

    \b
    Examples:
      quire chat Qwen/Qwen3-0.6B
      quire chat ~/models/SmolLM2-135M-Instruct --system "Answer in one sentence." --temperature 0
      quire chat Qwen/Qwen3-0.6B --device cuda:1 --kv-dtype fp8_e4m3
      echo "What is a page table?" | quire chat Qwen/Qwen3-0.6B > answer.txt
    """
    from quire.cli.chat import run
    from quire.cli.model import sampling

    params = sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    llm = _load(model, revision, dtype, device, kv_dtype, page_size, num_pages)
    run(llm, replace(params, max_tokens=max_tokens), system=system)


@app.command()
def serve(
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(
            metavar="MODEL",
            help=f"{MODEL_HELP} Default: the embedded demo model.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0: all of this machine's.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one.")] = 8000,
    served_model_name: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="What clients call the model; may be given several times.", show_default="MODEL as typed"
        ),
    ] = None,
    api_key: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="What clients must send; default: QUIRE_API_KEY, which other users do not see."),
    ] = None,
    max_model_len: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Most tokens of a prompt and its text.", show_default="the model's"),
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Most requests in one step.")] = 128,
    max_queue: Annotated[
        int, typer.Option(min=0, help="Texts that may wait beside them; more get 429.")
    ] = 256,
    enable_prefix_caching: Annotated[
        bool,
        typer.Option("--enable-prefix-caching/--no-enable-prefix-caching", help="Find prompts' pages again."),
    ] = True,
    revision: RevisionOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    kv_cache_dtype: Annotated[
        CacheDtype, typer.Option(help="Dtype of the pages; auto: that of the weights; fp8 is fp8_e4m3.")
    ] = CacheDtype.auto,
    page_size: PageSizeOption = 16,
    num_pages: NumPagesOption = None,
    trace: TraceOption = None,
) -> None:
    """Serve a model by OpenAI's API, over HTTP; for this machine alone unless --host says otherwise.

    Names of options are vLLM's. Ctrl-C or SIGTERM lets requests end for ten seconds, then stops.

    \b
    Examples:
      quire serve
      quire serve Qwen/Qwen3-0.6B --device cuda
      quire serve ~/models/SmolLM2-135M-Instruct --served-model-name smol --port 8001
      quire serve --trace trace.json                   and see /pages while it runs
      QUIRE_API_KEY=… quire serve ~/models/SmolLM2-135M-Instruct --host 0.0.0.0
    """
    from quire.cli.serve import run

    kinds = {"auto": None, "fp8": "fp8_e4m3"}
    run(
        model,
        host=host,
        port=port,
        names=served_model_name,
        api_key=api_key,
        max_num_seqs=max_num_seqs,
        max_queue=max_queue,
        trace=trace,
        max_model_len=max_model_len,
        enable_prefix_caching=enable_prefix_caching,
        revision=revision,
        dtype=dtype.value,
        device=device,
        kv_dtype=kinds.get(kv_cache_dtype.value, kv_cache_dtype.value),
        page_size=page_size,
        num_pages=num_pages,
    )


@app.command()
def demo(
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each prompt.")] = 96,
    num_pages: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Pages of the pool; fewer than the default make requests take turns."),
    ] = None,
    page_size: PageSizeOption = 16,
    seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="Shuffle the order in which the prompts arrive."),
    ] = None,
    model: ModelOption = None,
    revision: RevisionOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    compare: Annotated[
        bool,
        typer.Option("--compare/--no-compare", help="Measure a contiguous padded cache beside the pages."),
    ] = True,
    runs: Annotated[int, typer.Option(min=1, help="Measured runs, of which the table shows the median.")] = 3,
    save: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="FILE.svg", help="Save the page map at its fullest, and the table, as a picture."
        ),
    ] = None,
    trace: TraceOption = None,
) -> None:
    """Serve eight prompts at once and watch who owns which pages.

    Then a table: speed, waiting time and memory, beside the same prompts in a contiguous padded cache
    ([italic]model.generate[/italic] of transformers) in the same run, and whether the texts agree.

    \b
    Examples:
      quire demo
      quire demo --num-pages 112          too few pages: requests give theirs back and resume
      quire demo --model ~/models/SmolLM2-135M --max-tokens 64
      quire demo --save demo.svg
      quire demo --trace trace.json && quire pages trace.json pages.html
    """
    from quire.cli.demo import run

    run(
        model,
        weights={"revision": revision, "dtype": dtype.value, "device": device},
        max_tokens=max_tokens,
        num_pages=num_pages,
        page_size=page_size,
        seed=seed,
        compare=compare,
        runs=runs,
        save=save,
        trace=trace,
    )


@app.command()
def pages(
    trace: Annotated[
        Path, typer.Argument(metavar="TRACE", help="A file that --trace wrote.", show_default=False)
    ],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help=".html: a page to play it on; .svg: a picture of the fullest moment."
        ),
    ] = Path("pages.html"),
) -> None:
    """Show who owned which pages in a recorded trace. A server that runs shows it at /pages.

    \b
    Examples:
      quire pages trace.json                           writes pages.html, for a browser
      quire pages trace.json fullest.svg
    """
    from quire.cli.pages import run

    run(trace, out)


@app.command()
def doctor() -> None:
    """Say what this machine has: backends, SIMD width, threads, versions, what is missing and how to get it.

    Ends with a small self-check of every backend against the float64 reference; exit code 1 if one fails.

    \b
    Examples:
      quire doctor
      quire doctor > machine.txt          to go with a bug report
    """
    from quire.cli.doctor import run

    raise typer.Exit(run())


bench = typer.Typer(no_args_is_help=True)
app.add_typer(bench, name="bench")
_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@bench.callback()
def _bench() -> None:
    """Measure this machine, Quire beside its peers: correctness first, then time.

    Ceilings are measured in the same run; peers take turns; vLLM and OpenVINO need a Python of their own to be given.
    Needs a checkout of Quire. Each command has its own [bold]--help[/bold] and the grammar of its cases.

    \b
    Examples:
      quire bench attention                            the README's cases
      quire bench attention 8x2k:1 1x2k:2k@float32     8 decodes; a long prompt
      quire bench attention 2x8k:512+32x1k:1 --heads 32/8x128 --page-size 16
      quire bench attention --vllm-python ~/vllm/bin/python --out mine.csv
      quire bench generation 8x16-256:64               8 prompts, end to end
      quire bench generation 4x128:32 --engines quire model.generate
      quire bench prefix                               what prefix caching saves
      quire bench serving --scale 8                    many requests, beside transformers' caches
    """


@bench.command(context_settings=_PASSED_ON)
def attention(context: typer.Context) -> None:
    """Attention on pages, beside SDPA, FlexAttention and vLLM's CPU kernel."""
    from quire.cli.bench import run

    raise typer.Exit(run("attention", context.args))


@bench.command(context_settings=_PASSED_ON)
def generation(context: typer.Context) -> None:
    """Tokens per second of whole engines: Quire, transformers, vLLM, openvino-genai."""
    from quire.cli.bench import run

    raise typer.Exit(run("generation", context.args))


@bench.command(context_settings=_PASSED_ON)
def prefix(context: typer.Context) -> None:
    """What prefix caching saves: growing conversations, common examples, a long prompt again."""
    from quire.cli.bench import run

    raise typer.Exit(run("prefix", context.args))


@bench.command(context_settings=_PASSED_ON)
def serving(context: typer.Context) -> None:
    """Many requests at once: Quire beside transformers' contiguous caches and its continuous batching."""
    from quire.cli.bench import run

    raise typer.Exit(run("serving", context.args))
