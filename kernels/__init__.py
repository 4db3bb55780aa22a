"""Kernels: tensors to tensors. Knows bits, knows nothing about FX. Import as ``mikv_compile.kernels``.

The folder lies at the top of the repository, so with that folder on ``sys.path`` a plain ``import kernels`` finds it
before Hugging Face's package of the same name, which transformers imports. Under that name this module steps aside: it
hands over to the real package when one is installed, and otherwise shows a version that is too old for anybody to use
(raising ImportError would be more honest, but transformers imports the package to ask for its version).
"""

if __name__ == "kernels":
    import sys as _sys
    from importlib.machinery import PathFinder as _PathFinder
    from importlib.util import module_from_spec as _module_from_spec
    from pathlib import Path as _Path

    __version__ = "0"
    # Not only this folder is left out: another checkout's would look for the real package here in turn, without an end.
    _elsewhere = [p for p in _sys.path if not (_Path(p or ".") / "kernels" / "store_ops.py").is_file()]
    _spec = _PathFinder.find_spec("kernels", _elsewhere)
    if _spec is not None and _spec.loader is not None:
        _module = _module_from_spec(_spec)
        _sys.modules["kernels"] = _module
        _spec.loader.exec_module(_module)
