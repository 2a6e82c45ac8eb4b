"""How Numba's compiler is run over Quire's functions: parts are optimised once, and dead branches never typed.

Numba optimises every function and compiles it to machine code before it inlines it into its callers, which it then
optimises again. A ``part`` is only ever inlined. ``PartCompiler`` therefore stops at LLVM's unoptimised code, and LLVM
optimises the compiled function that the parts end up in as a whole. That nearly halves the time to compile a kernel.

Both compilers replace the fields of ``compile_time`` tuples by their numbers before types are inferred, so that
branches that are not taken for these numbers cost nothing.
"""

from __future__ import annotations

from typing import Any

from numba import _dynfunc, types
from numba.core import ir
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder, _LowerResult
from numba.core.compiler_machinery import FunctionPass, register_pass
from numba.core.typed_passes import NativeLowering
from numba.core.untyped_passes import IRProcessing


class ConfigType(types.Type):  # type: ignore[misc]
    """The Numba type of one value of a ``compile_time`` tuple."""

    def __init__(self, config: tuple[int, ...]) -> None:
        self.config = config
        super().__init__(f"quire_{type(config).__name__}{tuple(config)}")


@register_pass(mutates_CFG=False, analysis_only=False)
class NumberConfigs(FunctionPass):  # type: ignore[misc]
    """Fields of arguments that are ``compile_time`` tuples become numbers."""

    _name = "quire_number_configs"

    def __init__(self) -> None:
        FunctionPass.__init__(self)

    def run_pass(self, state: Any) -> bool:
        """Replace every ``argument.field`` by a constant; Numba's own passes then drop the branches it rules out."""
        function, configs = state.func_ir, {}
        for block in function.blocks.values():
            for statement in block.find_insts(ir.Assign):
                value = statement.value
                if isinstance(value, ir.Arg) and isinstance(state.args[value.index], ConfigType):
                    configs[statement.target.name] = state.args[value.index].config
        for block in function.blocks.values():
            for statement in block.find_insts(ir.Assign):
                value = statement.value
                if isinstance(value, ir.Expr) and value.op == "getattr" and value.value.name in configs:
                    number = ir.Const(getattr(configs[value.value.name], value.attr), value.loc)
                    definitions = function._definitions[statement.target.name]
                    definitions[definitions.index(value)] = number
                    statement.value = number
        return bool(configs)


class KernelCompiler(CompilerBase):  # type: ignore[misc]
    """Numba's pipeline for compiled functions, with the numbers of configs known."""

    def define_pipelines(self) -> list[Any]:
        """Numba's name for what it asks of a compiler."""
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
        passes.add_pass_after(NumberConfigs, IRProcessing)
        passes.finalize()
        return [passes]


class _PartLibrary(JITCodeLibrary):  # type: ignore[misc]
    """LLVM's code of a part and of the parts that it calls. It is neither optimised nor compiled to machine code."""

    def _optimize_functions(self, ll_module: Any) -> None:
        ll_module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True


@register_pass(mutates_CFG=True, analysis_only=False)
class LowerPart(NativeLowering):  # type: ignore[misc]
    """Lower a part for others to inline, as NativeLowering does, without a function that Python could call."""

    _name = "quire_lower_part"

    def run_pass(self, state: Any) -> bool:
        """As Numba calls it."""
        state.library = _PartLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        state.flags.no_compile = True
        super().run_pass(state)
        lowered = state["cr"]
        # Numba knows what it has compiled by a function object of its own; this one has no code.
        key = _dynfunc.make_function(
            lowered.fndesc.lookup_module(), lowered.fndesc.qualname, "", 0, lowered.env, (state.library,)
        )
        state.targetctx.insert_user_function(key, lowered.fndesc, [state.library])
        state["cr"] = _LowerResult(lowered.fndesc, lowered.call_helper, cfunc=key, env=lowered.env)
        return True


class PartCompiler(KernelCompiler):
    """The same pipeline for parts, which are lowered by LowerPart."""

    def define_pipelines(self) -> list[Any]:
        """Numba's name for what it asks of a compiler."""
        [passes] = super().define_pipelines()
        passes.passes = [
            (LowerPart, name) if step is NativeLowering else (step, name) for step, name in passes.passes
        ]
        passes.finalize()
        return [passes]
