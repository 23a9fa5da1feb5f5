"""Backends to evaluate: our engine, a model of `transformers`, or any other backend of lm-eval."""

from pathlib import Path
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import get_model, model_registry
from lm_eval.utils import simple_parse_args_string

from neox.config.options import did_you_mean
from neox.evaluation.adapter import EngineLM
from neox.generate import Engine
from neox.generate.loading import load_engine
from neox.system.console import one_line
from neox.system.device import resolve_device, resolve_dtype
from neox.system.fingerprint import fingerprint

# Options of the connection to a backend, which never change its answers; some are secret.
TRANSPORT = ("auth_token", "batch_size", "header", "max_retries", "num_concurrent", "timeout")


def load_model(
    model: str | Path | Engine,
    device: str = "auto",
    dtype: str | None = None,
    weights: str = "auto",
    model_args: str = "",
    batch_size: int | str = 8,
    progress: bool = True,
) -> tuple[LM, str, dict[str, Any]]:
    """Load a model to evaluate: lm-eval's LM, a hash of the model, and its `model` and `model_args` in the results.

    `model` is an engine; or what `checkpoint.load` takes; or hf:ID, with an @REVISION if wanted, a model that
    `transformers` loads, in lm-eval's own backend; or lm-eval:BACKEND, any backend of lm-eval by its name.
    `model_args` are a backend's arguments as lm-eval writes them, name=value,name=value. Raises ValueError, naming the
    model, for what cannot be loaded.
    """
    kind, _, name = str(model).partition(":")
    if isinstance(model, Engine) or not (name and kind in ("hf", "lm-eval")):
        if model_args:
            raise ValueError("model_args= is for hf:ID and lm-eval:BACKEND; others take device=, dtype=, weights=")
        return _ours(model, device, dtype, weights, progress)
    if weights != "auto":
        raise ValueError(f"weights={weights}: {model} runs in its own library, which takes dtype= or model_args=")
    arguments = simple_parse_args_string(model_args)
    if kind == "hf":
        repository, _, revision = (name, "", "") if Path(name).is_dir() else name.partition("@")
        where = {"pretrained": repository, **({"revision": revision} if revision else {})}
        named = str(resolve_dtype(dtype)).removeprefix("torch.") if dtype else "auto"
        how = {"device": str(resolve_device(device)), "dtype": named}
        arguments = where | how | arguments
        name = "hf"
    elif dtype or device != "auto":
        raise ValueError(f"{model} takes device and dtype in model_args=, as far as the backend has them")
    return _theirs(str(model), name, {"batch_size": batch_size} | arguments)


def _ours(
    model: str | Path | Engine, device: str, dtype: str | None, weights: str, progress: bool
) -> tuple[LM, str, dict[str, Any]]:
    engine = model if isinstance(model, Engine) else load_engine(model, device, dtype, weights)
    source = "engine" if isinstance(model, Engine) else str(model)
    try:
        backend = EngineLM(engine, progress)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    identity = fingerprint(engine.model.state_dict(), engine.model.config.model_dump(), backend.tokens.sha256)
    return (
        backend,
        identity,
        {"model": "neox", "model_args": {"pretrained": source, "weights": weights, "dtype": dtype}},
    )


def _theirs(model: str, backend: str, arguments: dict[str, Any]) -> tuple[LM, str, dict[str, Any]]:
    if backend not in model_registry:
        hint = did_you_mean(backend, sorted(model_registry))
        raise ValueError(f"{model}: lm-eval has no backend {backend!r}; {hint}")
    try:
        loaded = get_model(backend).create_from_arg_obj(arguments)
    except Exception as error:  # each backend has its own
        raise ValueError(f"{model}: cannot be loaded: {one_line(error)}") from error
    options = {name: value for name, value in arguments.items() if name not in TRANSPORT}
    network: Any = getattr(loaded, "model", None)  # of an API: a string
    identity = fingerprint(
        network.state_dict() if hasattr(network, "state_dict") else {}, backend, sorted(options.items())
    )
    return loaded, identity, {"model": backend, "model_args": options}
