"""Every private torch import lives here, so that a new torch release has one file to check."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from typing import Any

import torch

from mikv_compile.errors import MikvError
from mikv_compile.versions import check_torch, untested

check_torch(torch.__version__)  # before anything that an old release lacks is imported

try:
    from torch.fx.experimental.symbolic_shapes import statically_known_true as statically_known_true
    from torch.utils._pytree import tree_flatten as tree_flatten
    from torch.utils._pytree import tree_map_only as tree_map_only
    from torch.utils._pytree import tree_unflatten as tree_unflatten
except ImportError as error:
    raise ImportError(f"{untested(torch.__version__) or 'this build of torch is unusual'}: {error}") from error


def load_cpp_library(source: str, name: str, exact: bool = False) -> ctypes.CDLL:
    """Compile C++ with the toolchain of Inductor's CPU backend and load the result.

    Inductor's own cache does the work: ``-O3 -march=native -fopenmp``, the library is kept on disk under a hash of the
    source and the command line, and a file lock lets only one of several processes build it.

    Args:
        source: C++17 text whose entry points are ``extern "C"``.
        name: what the library is, for the error message.
        exact: every float operation is rounded by itself, as IEEE 754 says; otherwise products and sums are fused.

    Raises:
        RuntimeError: there is no compiler, it rejects the source, or the library does not load.
    """
    # Imported late: importing Inductor takes seconds, and not every process needs a kernel.
    from torch._inductor.codecache import CppCodeCache

    try:
        # Inductor turns contraction and signed zeros off; kernels that accumulate products need fused multiply-add.
        flags = ("-ffp-contract=off", "-fsigned-zeros") if exact else ("-ffp-contract=fast",)
        library = CppCodeCache.load(source, extra_flags=flags)
    except Exception as error:  # the exceptions differ between torch releases; all mean that there is no library
        raise RuntimeError(f"C++ library {name!r}: {type(error).__name__}: {error}") from error
    if not isinstance(library, ctypes.CDLL):
        raise RuntimeError(f"C++ library {name!r}: Inductor returned {type(library).__name__} instead of a CDLL")
    return library


def import_toolchain() -> None:
    """Import what :func:`load_cpp_library` needs, which takes a second or two."""
    import torch._inductor.codecache  # noqa: F401


def cpp_compiler() -> str:
    """The C++ compiler that :func:`load_cpp_library` calls.

    Raises:
        RuntimeError: there is none.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return get_cpp_compiler()
    except Exception as error:  # as in load_cpp_library
        raise RuntimeError(str(error)) from error


def cache_folder() -> str:
    """The folder in which Inductor keeps compiled code, the C++ kernels' libraries included."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir()


plain_functions = torch._C.DisableTorchFunctionSubclass
"""A context in which tensor subclasses' ``__torch_function__`` is not called."""

no_torch_function = torch._C._disabled_torch_function_impl
"""A tensor subclass with this as ``__torch_function__`` is seen by ``__torch_dispatch__`` only."""


def mark_dynamic(tensor: torch.Tensor, dim: int) -> None:
    """Let Dynamo trace this dimension as a symbol from the first time on."""
    torch._dynamo.maybe_mark_dynamic(tensor, dim)


def check_tensors_of_modules() -> None:
    """Let Dynamo look at a module's tensors before every call, for graphs that are compiled from now on.

    Otherwise releases such as 2.11 skip them while the module's dict holds the same objects. They would call a graph of
    dense tensors with one whose class has changed since, and Inductor's code would read memory that is gone.
    """
    torch.compiler.config.skip_tensor_guards_with_matching_dict_tags = False


def make_wrapper(
    cls: type[torch.Tensor], shape: Any, dtype: torch.dtype, device: torch.device, strides: Any = None
) -> Any:
    """A wrapper-subclass tensor without storage."""
    return torch.Tensor._make_wrapper_subclass(cls, shape, strides=strides, dtype=dtype, device=device)


def fake_dense(handle: Any) -> torch.Tensor:
    """The dense fake tensor that a fake handle stands for."""
    from torch._subclasses.fake_tensor import FakeTensor

    if not isinstance(handle.anchor, FakeTensor):
        raise traced_elsewhere("reading")
    with handle.anchor.fake_mode:
        return torch.empty(handle.shape, dtype=handle.dtype, device=handle.anchor.device)


def traced_elsewhere(operation: str) -> MikvError:
    """The error for a compiler that looks inside a handle."""
    return MikvError(
        f"a compiler traces {operation} of a compressed KV cache, but only graphs compiled with backend='mikv' can "
        "read one; compile this function with it too, or pass it handle.dequantize()"
    )


def growing_fake(
    fake_mode: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, dynamic: set[int], source: Any
) -> torch.Tensor:
    """A fake tensor whose dimensions ``dynamic`` are fresh symbols, equal to nothing else in the graph."""
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    sizes = [DimDynamic.DYNAMIC if i in dynamic else DimDynamic.STATIC for i in range(len(shape))]
    example = torch.empty(shape, dtype=dtype, device=device)
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
    return fake_mode.from_tensor(example, symbolic_context=context, source=source)


def fake_of_size(fake_mode: Any, shape: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A contiguous fake tensor whose sizes may be symbols that others have."""
    with fake_mode:
        return torch.empty(shape, dtype=dtype, device=device)


def fake_mode_of(fake: Any) -> Any:
    """The fake mode that a fake tensor, or the inner tensor of a fake handle, belongs to."""
    return getattr(fake, "anchor", fake).fake_mode


def buffer_source(name: str) -> Any:
    """A Dynamo source for a graph input that no user object stands behind."""
    from torch._dynamo.source import ConstantSource

    return ConstantSource(source_name=name)


def compile_with_inductor(gm: torch.fx.GraphModule, inputs: list[Any], options: dict[str, Any]) -> Any:
    """Inductor's compiled form of a graph; ``options`` hold for this call only."""
    import torch._inductor

    return torch._inductor.compile(gm, inputs, options=options)


def compile_ahead_of_time(program: torch.export.ExportedProgram, options: dict[str, Any]) -> list[Any]:
    """AOTInductor's files of an exported program, with its weights apart; for :func:`write_package`."""
    import torch._inductor

    args, kwargs = program.example_inputs  # type: ignore[misc]
    settings = {
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.package_constants_on_disk_format": "pickle_weights",
    }
    return torch._inductor.aot_compile(program.module(), args, kwargs, options={**options, **settings})  # type: ignore


def write_package(path: str, programs: dict[str, list[Any]], texts: dict[str, str]) -> None:
    """Write programs of :func:`compile_ahead_of_time` and texts to a ``.pt2`` file; equal weights are there once."""
    from torch.export.pt2_archive._package import package_pt2

    package_pt2(path, aoti_files=programs, extra_files=texts)


def read_package(path: str) -> dict[str, Any]:
    """The callable programs of a ``.pt2`` file; they share equal weights."""
    from torch.export.pt2_archive._package import load_pt2

    return load_pt2(path, load_weights_from_disk=True).aoti_runners


def mode_options(mode: str) -> dict[str, Any]:
    """Inductor options of a ``torch.compile`` mode."""
    import torch._inductor

    return dict(torch._inductor.list_mode_options(mode))


def symbol_of(size: Any) -> Any:
    """The sympy expression of a symbolic integer, or None for a plain or known number."""
    if not isinstance(size, torch.SymInt) or size.node.expr.is_number:
        return None
    return size.node.expr


def optimized_module_class() -> Any:
    """The class of what ``torch.compile(module)`` returns."""
    from torch._dynamo.eval_frame import OptimizedModule

    return OptimizedModule


def backend_name(wrapper: Any) -> str | None:
    """Name of the backend that an optimized module compiles with, or None if it is not known."""
    callback = wrapper.dynamo_ctx.callback
    while callback is not None and not hasattr(callback, "compiler_name"):
        callback = getattr(callback, "_torchdynamo_orig_backend", None)
    return getattr(callback, "compiler_name", None)


def shares_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True if two plain tensors lie in the same memory."""
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def storage_is_shared(tensor: torch.Tensor) -> bool:
    """True if another tensor lies in this one's memory, or the memory cannot be given back."""
    storage = tensor.untyped_storage()
    # One reference is the tensor's, one is that of the Python object `storage`.
    return torch._C._storage_Use_Count(storage._cdata) > 2 or not storage.resizable()


def parse_to(*args: Any, **kwargs: Any) -> Any:
    """(device, dtype, non_blocking, memory_format) of the arguments of ``Tensor.to``."""
    return torch._C._nn._parse_to(*args, **kwargs)


def is_traced() -> bool:
    """Whether a compiler traces the code that asks.

    Torch's own ``is_compiling`` is also true in a thread that runs eagerly while another one compiles.
    """
    if not torch.compiler.is_compiling():
        return False
    # The first is a constant while Dynamo traces; other tracers run the code under a mode of this thread.
    return torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack() > 0


def must_run_eagerly() -> bool:
    """While Dynamo traces an operation on a tensor that has no memory: True if the graph must not get it.

    That is so if a registered backend other than "mikv" would get the graph, and read the memory; a function that
    somebody passes as a backend is trusted, as it may well hand the graph on to "mikv". And if Dynamo compiles
    ``__torch_function__`` on its own, because the operation is called from eager code between two graphs.
    """
    import torch._dynamo
    from torch._dynamo.symbolic_convert import InstructionTranslator

    output = InstructionTranslator.current_tx().output
    if "__torch_function__" in output.root_tx.f_code.co_name:
        return True
    callback: Any = output.compiler_fn
    name = None
    while callback is not None and name is None:
        name = getattr(callback, "compiler_name", None)
        callback = getattr(callback, "_torchdynamo_orig_backend", None)
    return name != "mikv" and name in torch._dynamo.list_backends(exclude_tags=())


# Dynamo runs it while tracing, and takes the answer as a constant.
must_run_eagerly._dynamo_marked_constant = True  # type: ignore[attr-defined]


def traced_local(name: str) -> tuple[Any, Any]:
    """Value and source of a local of the function that Dynamo is tracing, for functions that run while it traces.

    Unlike anything that traced code can do, this puts no guard on the value. (None, None) for what is not an object or
    constant, such as a tensor; no source for what the code computed.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._dynamo.variables.lazy import LazyVariableTracker
    from torch._dynamo.variables.user_defined import UserDefinedObjectVariable

    variable: Any = InstructionTranslator.current_tx().output.current_tx.symbolic_locals[name]
    if isinstance(variable, LazyVariableTracker):
        if not variable.is_realized():
            return variable.original_value(), variable.original_source()
        variable = variable.unwrap()
    if isinstance(variable, UserDefinedObjectVariable):
        return variable.value, variable.source
    if variable.is_python_constant():
        return variable.as_python_constant(), variable.source
    return None, None


def value_at(source: Any, given: dict[str, Any]) -> Any:
    """What a Dynamo source finds if the traced function is called with other arguments; None if it finds nothing."""
    name = source.name() if callable(source.name) else source.name
    try:
        return eval(name, {"L": given})
    except Exception:  # names of Dynamo's own helpers, modules that this layer lacks
        return None


def is_whole_call(gm: torch.fx.GraphModule) -> bool:
    """Whether a graph is all of a compiled call: no break splits it, and nothing around it runs uncompiled.

    False where that cannot be told.
    """
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or reason.graph_break:
        return False
    frame, around = sys._getframe(), []
    while frame is not None and frame.f_code.co_name != "compile_wrapper":
        around.append(frame.f_code.co_filename)
        frame = frame.f_back  # type: ignore[assignment]
    dynamo = [i for i, file in enumerate(around) if "_dynamo" in file]
    # Between the call of the compiled function and Dynamo there is at most the calling of a module.
    return frame is not None and bool(dynamo) and set(around[dynamo[-1] + 1 :]) <= {torch.nn.modules.module.__file__}


def untraced(function: Any, reason: str) -> Any:
    """The function, at which Dynamo breaks the graph, or says the reason with ``fullgraph=True``."""
    return torch.compiler.disable(function, reason=reason)


def new_fake_mode() -> Any:
    """A fake mode with symbolic sizes of its own."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def sized_fake(
    fake_mode: Any, tensor: torch.Tensor, dynamic: set[int], name: str, device: torch.device | None = None
) -> torch.Tensor:
    """A fake of a tensor on "meta", as if it were on ``device``; dimensions ``dynamic`` are fresh symbols."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    sizes = [DimDynamic.DYNAMIC if i in dynamic else DimDynamic.STATIC for i in range(tensor.dim())]
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
    made = fake_mode.from_tensor(tensor, symbolic_context=context, source=buffer_source(name))
    if device is None or device.type == "meta":
        return made
    with fake_mode.shape_env.ignore_fresh_unbacked_symbols():
        return FakeTensor(fake_mode, _meta_of(made), device)


@contextlib.contextmanager
def on_fakes(fake_mode: Any) -> Iterator[None]:
    """Run operations on fake tensors as Dynamo does.

    Without the Python dispatcher, composite operations run in C++, which may ask for sizes as numbers: in torch 2.11
    ``matmul`` makes constants of symbolic sizes.
    """
    from torch._dispatch.python import enable_python_dispatcher

    with fake_mode, enable_python_dispatcher():
        yield


def _meta_of(fake: Any) -> torch.Tensor:
    from torch._subclasses.fake_tensor import in_kernel_invocation_manager

    with in_kernel_invocation_manager(fake.fake_mode):
        return torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device="meta")


def hint_of(size: torch.SymInt) -> int | None:
    """The size that a symbolic integer was traced with; None if it depends on data."""
    return int(size.node.hint) if size.node.has_hint() else None


def limits_of(size: torch.SymInt) -> tuple[int, int | None]:
    """Least and greatest value that the tracer was told of a symbol; (0, None) where it was told nothing."""
    shape_env = size.node.shape_env
    limits = getattr(shape_env, "var_to_range", {}).get(size.node.expr)
    if limits is None:
        return 0, None
    least = int(limits.lower) if limits.lower.is_Integer and limits.lower > 2 else 0
    return least, int(limits.upper) if limits.upper.is_Integer else None


def substituted(expression: Any, values: dict[Any, Any]) -> Any:
    """A sympy expression of sizes, computed with symbolic integers in the place of its symbols."""
    import sympy

    symbols = sorted(expression.free_symbols, key=str)
    return sympy.lambdify(symbols, expression, modules="math")(*(values[s] for s in symbols))


def tree_unique_symbols(values: Any) -> list[torch.SymInt]:
    """One symbolic integer for each symbol that is a size of a tensor by itself; integers are left out."""
    found: dict[Any, Any] = {}
    given = {symbol_of(value) for value in values if isinstance(value, torch.SymInt)}
    for value in values:
        for size in value.shape if isinstance(value, torch.Tensor) else ():
            symbol = symbol_of(size)
            if symbol is not None and symbol.is_Symbol and symbol not in given:
                found.setdefault(symbol, size)
    return list(found.values())


def guard_expressions(shape_env: Any) -> list[Any]:
    """What a shape environment assumes beyond the sizes that it shows, as sympy conditions."""
    found = [shape_env.replace(guard.expr) for guard in shape_env.guards]
    return [expression for expression in dict.fromkeys(found) if expression not in (True, False)]


def least_sizes(shape_env: Any) -> dict[Any, int]:
    """The least value of each symbol; sizes 0 and 1 are traced as constants."""
    ranges = shape_env.var_to_range
    return {symbol: int(limits.lower) for symbol, limits in ranges.items() if limits.lower.is_Integer}


def input_spec(graph: torch.fx.Graph) -> Any:
    """The pytree of a graph's inputs, or None if it takes its placeholders one by one."""
    info = getattr(graph._codegen, "pytree_info", None)
    return None if info is None else info.in_spec


def takes_keywords(spec: Any) -> bool:
    """Whether a pytree of inputs is ``((arguments), {keywords})``, as export has it."""
    return spec.type is tuple and spec.num_children == 2 and spec.child(0).type is tuple and spec.child(1).type is dict


def same_structure(a: Any, b: Any) -> bool:
    """Whether two pytrees are alike apart from lists in the place of tuples."""
    if a.is_leaf() or b.is_leaf():
        return bool(a.is_leaf() and b.is_leaf())
    kinds = {list, tuple}
    if a.num_children != b.num_children or not (a.type is b.type or {a.type, b.type} <= kinds):
        return False
    if a.type not in kinds and a.context != b.context:
        return False
    return all(same_structure(a.child(i), b.child(i)) for i in range(a.num_children))


def layout_of(node: Any) -> tuple[Any, ...] | None:
    """Shape, dtype and device that a tracer noted for a node, as something that compares without guards."""
    value = getattr(node, "meta", {}).get("val")
    if not isinstance(value, torch.Tensor):
        return None
    return (*(symbol_of(size) or int(size) for size in value.shape), value.dtype, value.device)
