"""Generating on a CPU: neox, transformers, CTranslate2 and llama.cpp in turn, on random weights of published shapes.

    python benchmarks/decode_cpu.py [shapes=pythia-160m,pythia-1.4b] [turns=3] [tokens=32] [only=neox,llama.cpp]
    pip install ctranslate2 gguf llama-cpp-python      # the peers; one that is absent is named and left out

One float16 checkpoint a shape, converted for each peer from the same values; each measurement is a process of its own
that loads its own format, on all cores. Greedy, no end-of-document token. Decoding: the time of `tokens` new tokens
after a prompt of 16, less the time of the first, for 1 and for 8 sequences at once; prefill: a prompt of 256 with one
new token. Before each process the read speed of memory is measured; the share is the bytes of the matrices that a token
reads (embedding, cache and scales a row not counted), times tokens/s at batch 1, over that. Peak memory is VmHWM,
loading included. `same` counts the first tokens that are those of transformers in float32: a check of the conversion,
where coarser weights differ sooner. llama.cpp has tanh-GELU for every GPT-NeoX. Medians over the turns.
"""

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPT, PREFILL, BATCHES, COMPARED = 16, 256, (1, 8), 16
# Row: (who, kind, bits of a weight in the blocks, in the head).
ROWS = (
    ("neox", "fp32", 32, 32),
    ("neox", "bf16", 16, 16),
    ("neox", "w16a16", 16, 16),
    ("neox", "fp16", 16, 16),
    ("neox", "int8", 8, 8),
    ("neox", "int4", 4.125, 8),
    ("transformers", "fp32", 32, 32),
    ("transformers", "bf16", 16, 16),
    ("ctranslate2", "float32", 32, 32),
    ("ctranslate2", "int8", 8, 8),
    ("llama.cpp", "F16", 16, 16),
    ("llama.cpp", "Q8_0", 8.5, 8.5),
    ("llama.cpp", "Q4_0", 4.5, 6.5625),  # llama-quantize keeps the head in Q6_K
)
PACKAGES = {
    "neox": (),
    "transformers": ("transformers",),
    "ctranslate2": ("ctranslate2",),
    "llama.cpp": ("llama_cpp", "gguf"),
}
QUANTIZED = {"Q8_0": 7, "Q4_0": 2}  # llama.cpp's llama_ftype


def main(shapes, turns, tokens, only):
    rows = [row for row in ROWS if row[0] in only]
    for who in only:
        if absent := [name for name in PACKAGES[who] if importlib.util.find_spec(name) is None]:
            print(f"{who} is left out: no package {', '.join(absent)}")
            rows = [row for row in rows if row[0] != who]
    for shape in shapes:
        with tempfile.TemporaryDirectory(prefix="decode-") as folder:
            measure_shape(shape, rows, turns, tokens, Path(folder))


def measure_shape(shape, rows, turns, tokens, folder):
    child("checkpoint", shape, folder)
    for who, kind, *_ in rows:
        child("convert", who, kind, folder)
    blocks, head = (int(part) for part in child("matrices", shape).split())
    found = {row: [] for row in rows}
    for turn in range(turns):
        for row in rows:
            read = float(child("read"))
            one = json.loads(child("measure", row[0], row[1], folder, tokens))
            size = (blocks * row[2] + head * row[3]) / 8
            found[row].append(one | {"share": one["decode1"] * size / read, "read": read})
            print(f"{shape} turn {turn} {row[0]} {row[1]}: {one['decode1']:.1f} tokens/s", file=sys.stderr, flush=True)
    reference = next((runs[0]["first"] for row, runs in found.items() if row[:2] == ("transformers", "fp32")), None)
    read = statistics.median(run["read"] for runs in found.values() for run in runs)
    print(f"\n### {shape}: {blocks:,} weights in the blocks, {head:,} in the head; {turns} turns, {tokens} tokens")
    print(f"\nMemory read at {read / 1e9:.1f} GB/s (median), {cores()} cores.\n")
    print("| | tokens/s, batch 1 | batch 8 | prefill tokens/s | share of read speed | peak memory | same |")
    print("|---|---|---|---|---|---|---|")
    for (who, kind, *_), runs in found.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0] if key != "first"}
        same = "" if reference is None else str(agreement(runs[0]["first"], reference))
        print(
            f"| {who} {kind} | {middle['decode1']:.1f} | {middle['decode8']:.1f} | {middle['prefill']:.0f} "
            f"| {middle['share']:.0%} | {middle['peak'] / 1e9:.2f} GB | {same} |"
        )


def child(*arguments):
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()[-1] if done.stdout else ""


def agreement(first, second):
    equal = [a == b for a, b in zip(first, second, strict=True)]
    return equal.index(False) if False in equal else len(equal)


# --- in a process of its own ----------------------------------------------------------------------------------------


def measure(who, kind, folder, tokens):
    """Print what `generate(prompts, new tokens)` of one peer reaches, as JSON."""
    generate = LOAD[who](Path(folder), kind)
    vocab = json.loads((Path(folder) / "hf" / "config.json").read_text())["vocab_size"]

    def prompts(rows, length):
        return [[(7919 * (row + 1) * (place + 1)) % vocab for place in range(length)] for row in range(rows)]

    def seconds(rows, length, new):
        started = time.perf_counter()
        generate(prompts(rows, length), new)
        return time.perf_counter() - started

    result = {"first": generate(prompts(1, PROMPT), COMPARED)[0]}  # and warms up
    for rows in BATCHES:
        alone = min(seconds(rows, PROMPT, 1) for _ in range(2))
        spent = min(seconds(rows, PROMPT, 1 + tokens) for _ in range(2))
        result[f"decode{rows}"] = rows * tokens / (spent - alone)
    result["prefill"] = PREFILL / min(seconds(1, PREFILL, 1) for _ in range(2))
    with open("/proc/self/status") as status:
        result["peak"] = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    print(json.dumps(result))


def cores():
    from neox.system.machine import available_cores

    return available_cores()


def write_checkpoint(shape, folder):
    """`folder`/hf: seeded weights of the preset `shape` in float16."""
    import neox
    from neox.model.decoder import GPTNeoX

    model = GPTNeoX(neox.ModelConfig(**neox.preset(shape)["model"])).initialize(1)
    neox.save(model.half(), Path(folder) / "hf")


def print_matrices(shape):
    import neox

    model = neox.ModelConfig(**neox.preset(shape)["model"])
    c, f = model.hidden_size, model.ffn_size
    print(model.num_hidden_layers * (4 * c * c + 2 * c * f), model.vocab_size * c)


def load_neox(folder, kind):
    import neox
    from neox.generate import Sampling
    from neox.generate.loading import load_engine

    model = load_engine(folder / "hf", "cpu", weights=kind).model

    def generate(prompts, new):
        sampling = Sampling(max_tokens=new, temperature=0, stop_at_eod=False)
        return [done.tokens for done in neox.Engine(model, slots=len(prompts)).generate(prompts, sampling)]

    return generate


def load_transformers(folder, kind):
    import torch
    from transformers import AutoModelForCausalLM

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[kind]
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=dtype).eval()

    model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def generate(prompts, new):
        ids = torch.tensor(prompts)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        return out[:, ids.shape[1] :].tolist()

    return generate


def hugging_face_weights(folder):
    """(config, name -> float16 numpy array, fused projections as [q; k; v] in place of interleaved heads)."""
    from safetensors.numpy import load_file

    config = json.loads((folder / "hf" / "config.json").read_text())
    weights = {}
    for file in sorted((folder / "hf").glob("*.safetensors")):
        weights |= load_file(file)
    heads = config["num_attention_heads"]
    for name, value in weights.items():
        if "query_key_value" in name:
            parts = value.reshape(heads, 3, -1, *value.shape[1:]).swapaxes(0, 1)
            weights[name] = parts.reshape(value.shape)
    return config, weights


def rotary_dim(config):
    fraction = config.get("rope_parameters", {}).get("partial_rotary_factor", config.get("rotary_pct"))
    return int(fraction * config["hidden_size"] // config["num_attention_heads"])


def convert_ctranslate2(folder, kind):
    """Its own specification filled in: its converter reads attributes that transformers 5 no longer has."""
    import ctranslate2
    import numpy as np

    config, weights = hugging_face_weights(folder)
    spec = ctranslate2.specs.TransformerDecoderModelSpec.from_config(
        config["num_hidden_layers"],
        config["num_attention_heads"],
        pre_norm=True,
        activation=ctranslate2.specs.Activation.GELU,
        rotary_dim=rotary_dim(config),
        rotary_interleave=False,
        parallel_residual=True,
        shared_layer_norm=False,
    )

    def fill(part, name, scale="weight"):
        names = ("gamma", "beta") if scale == "gamma" else ("weight", "bias")
        for attribute, suffix in zip(names, ("weight", "bias"), strict=True):
            if (value := weights.pop(f"{name}.{suffix}", None)) is not None:
                setattr(part, attribute, value.astype(np.float32))

    decoder = spec.decoder
    decoder.scale_embeddings = False
    fill(decoder.embeddings, "gpt_neox.embed_in")
    fill(decoder.layer_norm, "gpt_neox.final_layer_norm", "gamma")
    fill(decoder.projection, "embed_out")
    fill(decoder.projection, "lm_head")
    for number, layer in enumerate(decoder.layer):
        name = f"gpt_neox.layers.{number}"
        fill(layer.input_layer_norm, f"{name}.input_layernorm", "gamma")
        fill(layer.post_attention_layer_norm, f"{name}.post_attention_layernorm", "gamma")
        fill(layer.self_attention.linear[0], f"{name}.attention.query_key_value")
        fill(layer.self_attention.linear[1], f"{name}.attention.dense")
        fill(layer.ffn.linear_0, f"{name}.mlp.dense_h_to_4h")
        fill(layer.ffn.linear_1, f"{name}.mlp.dense_4h_to_h")
    assert not weights, f"not converted: {sorted(weights)}"
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
    spec.config.layer_norm_epsilon = config["layer_norm_eps"]
    spec.register_vocabulary([str(number) for number in range(config["vocab_size"])])
    spec.validate()
    spec.optimize(quantization=kind)
    target = folder / f"ctranslate2-{kind}"
    target.mkdir()
    spec.save(str(target))


def load_ctranslate2(folder, kind):
    import ctranslate2

    generator = ctranslate2.Generator(
        str(folder / f"ctranslate2-{kind}"), device="cpu", compute_type=kind, intra_threads=cores()
    )

    def generate(prompts, new):
        text = [[str(token) for token in prompt] for prompt in prompts]
        # Its length counts the prompt's end: an end token that cannot be drawn leaves the length alone to stop it.
        found = generator.generate_batch(
            text, max_length=new, min_length=new, include_prompt_in_result=False, suppress_sequences=[["0"]]
        )
        return [one.sequences_ids[0] for one in found]

    return generate


def convert_llama(folder, kind):
    """F16 by the gguf package, the others from it by llama.cpp's own quantizer."""
    import gguf
    import numpy as np

    whole = folder / "F16.gguf"
    if not whole.exists():
        config, weights = hugging_face_weights(folder)
        writer = gguf.GGUFWriter(str(whole), "gptneox")
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_rope_dimension_count(rotary_dim(config))
        writer.add_head_count(config["num_attention_heads"])
        writer.add_parallel_residual(True)
        writer.add_layer_norm_eps(config["layer_norm_eps"])
        writer.add_vocab_size(config["vocab_size"])
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
        writer.add_tokenizer_model("no_vocab")
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPTNEOX, config["num_hidden_layers"])
        for name, value in weights.items():
            target = names.get_name(name.replace("lm_head", "embed_out"), (".weight", ".bias"))
            assert target, f"not converted: {name}"
            writer.add_tensor(target, value if value.ndim == 2 else value.astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    if kind in QUANTIZED:
        import llama_cpp

        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype, options.nthread = QUANTIZED[kind], cores()
        target = folder / f"{kind}.gguf"
        assert llama_cpp.llama_model_quantize(str(whole).encode(), str(target).encode(), options) == 0


def load_llama(folder, kind):
    """Its C interface, which decodes several sequences in one call; the Python class knows one only."""
    import llama_cpp as llama
    import numpy as np

    llama.llama_backend_init()
    quiet = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(quiet, None)
    model = llama.llama_model_load_from_file(str(folder / f"{kind}.gguf").encode(), llama.llama_model_default_params())
    vocab = json.loads((folder / "hf" / "config.json").read_text())["vocab_size"]
    options = llama.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch, options.n_seq_max = 4096, 512, 512, max(BATCHES)
    options.n_threads = options.n_threads_batch = cores()
    options.kv_unified = True
    context = llama.llama_init_from_model(model, options)
    assert context, "llama.cpp could not load its file"
    batch = llama.llama_batch_init(512, 0, 1)

    def step(tokens, places):
        """Logits after the last of each row's tokens."""
        wanted, at = [], 0
        for row, (own, place) in enumerate(zip(tokens, places, strict=True)):
            for number, token in enumerate(own):
                batch.token[at], batch.pos[at] = token, place + number
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, row
                batch.logits[at] = number == len(own) - 1
                at += 1
            wanted.append(at - 1)
        batch.n_tokens = at
        assert llama.llama_decode(context, batch) == 0, "llama.cpp could not decode"
        rows = (np.ctypeslib.as_array(llama.llama_get_logits_ith(context, at), (vocab,)) for at in wanted)
        return [int(row.argmax()) for row in rows]

    def generate(prompts, new, hold=quiet):  # the callback lives as long as what calls it
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        drawn = [[token] for token in step(prompts, [0] * len(prompts))]
        for place in range(len(prompts[0]), len(prompts[0]) + new - 1):
            for row, token in zip(drawn, step([row[-1:] for row in drawn], [place] * len(drawn)), strict=True):
                row.append(token)
        return drawn

    return generate


LOAD = {"neox": load_neox, "transformers": load_transformers, "ctranslate2": load_ctranslate2, "llama.cpp": load_llama}
CONVERT = {"ctranslate2": convert_ctranslate2, "llama.cpp": convert_llama}


if __name__ == "__main__":
    task, *rest = sys.argv[1:] or [""]
    if task == "checkpoint":
        write_checkpoint(*rest)
    elif task == "convert":
        if rest[0] in CONVERT:
            CONVERT[rest[0]](Path(rest[2]), rest[1])
    elif task == "matrices":
        print_matrices(*rest)
    elif task == "read":
        from neox.system.machine import read_speed

        print(read_speed(1.0))
    elif task == "measure":
        measure(rest[0], rest[1], rest[2], int(rest[3]))
    else:
        options = dict(argument.split("=", 1) for argument in sys.argv[1:])
        main(
            options.get("shapes", "pythia-160m,pythia-1.4b").split(","),
            int(options.get("turns", 3)),
            int(options.get("tokens", 32)),
            options.get("only", ",".join(PACKAGES)).split(","),
        )
