"""The engines of the table: each reads a prompt, then makes tokens one by one, in a process of its own."""

# The other engines are installed in an environment of their own.
# pyright: reportMissingImports=false

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.llm.models import Decoder

_LOADED_AT_ONCE = 512  # tokens of a prompt that llama.cpp computes together, its default


class DecoderEngine:
    """One engine with one decoder loaded, for texts of up to `context` tokens."""

    name: str
    distribution: str

    def __init__(self, decoder: Decoder, threads: int, context: int) -> None:
        raise NotImplementedError

    def version(self) -> str:
        """Return the engine's version."""
        return metadata.version(self.distribution)

    def start(self, prompt: Sequence[int]) -> None:
        """Forget everything, read a prompt, and choose the token after it."""
        raise NotImplementedError

    def step(self) -> None:
        """Read the token chosen last, and choose the next one."""
        raise NotImplementedError


class Optimizer(DecoderEngine):
    """This project: a package made before, from the same model as onnxruntime-genai's."""

    name = "optimizer"
    distribution = "optimizer"

    def __init__(self, decoder: Decoder, threads: int, context: int) -> None:
        from optimizer.runtime import load  # noqa: PLC0415

        model = load(package_path(decoder), threads=threads)
        from optimizer.runtime.generation import DecoderSession  # noqa: PLC0415 - loading imports most of it

        self._session = DecoderSession(model, capacity=context)
        self._token = 0

    def start(self, prompt: Sequence[int]) -> None:
        self._session.rewind(0)
        self._token = int(self._session.append(prompt).argmax())

    def step(self) -> None:
        self._token = int(self._session.append([self._token]).argmax())


class OnnxRuntimeGenai(DecoderEngine):
    """onnxruntime-genai."""

    name = "onnxruntime-genai"
    distribution = "onnxruntime-genai"

    def __init__(self, decoder: Decoder, threads: int, context: int) -> None:
        import onnxruntime_genai  # noqa: PLC0415 - not every environment has it

        config = onnxruntime_genai.Config(str(decoder.onnx_path.parent))
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = onnxruntime_genai.Model(config)
        self._make = onnxruntime_genai
        self._context = context
        self._generator: Any = None

    def start(self, prompt: Sequence[int]) -> None:
        parameters = self._make.GeneratorParams(self._model)
        # No end of text: as many tokens as are asked for.
        parameters.set_search_options(max_length=self._context, min_length=self._context, do_sample=False)
        self._generator = self._make.Generator(self._model, parameters)
        self._generator.append_tokens(list(prompt))
        self._generator.generate_next_token()

    def step(self) -> None:
        self._generator.generate_next_token()


class LlamaCpp(DecoderEngine):
    """llama.cpp, by the functions of its library that llama-cpp-python builds and wraps."""

    name = "llama.cpp"
    distribution = "llama-cpp-python"

    def __init__(self, decoder: Decoder, threads: int, context: int) -> None:
        import llama_cpp  # noqa: PLC0415 - not every environment has it

        self._library = llama_cpp
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(decoder.gguf_path).encode(), llama_cpp.llama_model_default_params()
        )
        parameters = llama_cpp.llama_context_default_params()
        # By default it chooses flash attention: tokens after 512 take 1.5 to 2.9 times as long (Granite Rapids).
        parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.n_ctx = context
        parameters.n_batch = context
        parameters.n_ubatch = _LOADED_AT_ONCE
        parameters.n_threads = parameters.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot load {decoder.gguf_path}")
        self._vocabulary = decoder.vocabulary
        self._token = 0

    def start(self, prompt: Sequence[int]) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        self._read(prompt)

    def step(self) -> None:
        self._read([self._token])

    def _read(self, tokens: Sequence[int]) -> None:
        import numpy as np  # noqa: PLC0415

        numbers = (ctypes.c_int32 * len(tokens))(*tokens)  # the batch points to them
        if self._library.llama_decode(self._context, self._library.llama_batch_get_one(numbers, len(tokens))):
            raise RuntimeError("llama_decode failed")
        logits = self._library.llama_get_logits_ith(self._context, -1)
        self._token = int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())


class Reads(DecoderEngine):
    """No engine: reads the bytes that each token after a prompt takes, at the speed of memory.

    They are those of the products' weights and of the prompt's keys and values in 16 bits.
    """

    name = "read"
    distribution = "optimizer"

    def __init__(self, decoder: Decoder, threads: int, context: int) -> None:
        from optimizer.runtime.threads import use_threads  # noqa: PLC0415

        use_threads(threads)
        self._decoder, self._threads = decoder, threads
        self._step: Callable[[], object] = lambda: None

    def version(self) -> str:
        return ""

    def start(self, prompt: Sequence[int]) -> None:
        import tvm  # noqa: PLC0415

        from optimizer.compile import find_target  # noqa: PLC0415
        from optimizer.tuning.peak import read  # noqa: PLC0415

        target = find_target("host")
        work = self._decoder.weight_bytes + self._decoder.cache_bytes(len(prompt), 2)
        function, arrays = read(target, work, self._threads)
        arguments = [tvm.runtime.tensor(array) for array in arrays]
        entry = tvm.compile(function, target=target.tvm_target())["main"]
        self._step = lambda: entry(*arguments)
        self._step()

    def step(self) -> None:
        self._step()


ENGINES: dict[str, type[DecoderEngine]] = {
    engine.name: engine for engine in (Optimizer, LlamaCpp, OnnxRuntimeGenai, Reads)
}


def package_path(decoder: Decoder) -> Path:
    """Return where this compiler's package of a decoder is kept."""
    return decoder.onnx_path.with_name("package")


def compile_package(decoder: Decoder) -> float:
    """Compile a decoder anew for this machine and return how many seconds it took."""
    target = package_path(decoder)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / "package"
        command = ["compile", str(decoder.onnx_path), "-o", str(made), "--no-certificate"]
        command += ["--kv-cache-dtype", "fp16"]  # as llama.cpp's cache is
        subprocess.run([sys.executable, "-m", "optimizer", *command], check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(target, ignore_errors=True)
        made.rename(target)
    return time.perf_counter() - start
