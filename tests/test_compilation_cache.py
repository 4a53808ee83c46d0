"""`torch_rpa.use_compilation_cache`: what one process has compiled, the next one does not compile."""

import json
import os
import subprocess
import sys

import pytest

IS_CPU = os.environ.get("PJRT_DEVICE") == "CPU"
PROGRAM = """
import json, sys, warnings
import torch
import torch_rpa
warnings.simplefilter("ignore")
torch_rpa.use_compilation_cache(sys.argv[1])
import torch_rpa.hf, torch_xla
import torch_xla.debug.metrics as metrics
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
sizes = dict(hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
model = LlamaForCausalLM(LlamaConfig(vocab_size=128, head_dim=64, max_position_embeddings=64, **sizes)).to("xla").eval()
torch_rpa.hf.patch(model, page_size=16, max_num_seqs=2, token_buckets=(8,), num_pages=8)
(result,) = model.generate_batch([[1, 2, 3]], max_new_tokens=4).values()
names = ("UncachedCompile", "PersistentCacheMiss", "PersistentCacheHit", "PersistentCacheDeserializeFailure")
print(json.dumps({"tokens": result.generated_tokens, **{name: metrics.counter_value(name) or 0 for name in names}}))
"""


def run(code, *argv):
    """The last line that a new process prints."""
    result = subprocess.run([sys.executable, "-c", code, *map(str, argv)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.splitlines()[-1]


@pytest.mark.slow
def test_a_second_process_finds_every_program_that_the_first_one_compiled(tmp_path):
    """PJRT CPU cannot load what it finds (it is no miss, but a DeserializeFailure); a TPU compiles nothing."""
    first, second = (json.loads(run(PROGRAM, tmp_path)) for _ in range(2))
    assert first["PersistentCacheMiss"] == first["UncachedCompile"] > 0
    assert second["PersistentCacheMiss"] == 0
    assert second["tokens"] == first["tokens"]
    loaded = "PersistentCacheDeserializeFailure" if IS_CPU else "PersistentCacheHit"
    assert second[loaded] == first["PersistentCacheMiss"]
    if not IS_CPU:
        assert second["UncachedCompile"] == 0


@pytest.mark.skipif(not IS_CPU, reason="a TPU loads its programs")
def test_pjrt_cpu_says_that_it_cannot_load_programs(tmp_path):
    code = (
        "import sys, warnings, torch_rpa; warnings.simplefilter('error'); torch_rpa.use_compilation_cache(sys.argv[1])"
    )
    with pytest.raises(AssertionError, match="cannot load them again"):
        run(code, tmp_path)


def test_too_late_a_call_is_an_error(tmp_path):
    code = """
import sys, torch, torch_rpa, torch_xla
x = torch.ones(2, device="xla") + 1
torch_xla.sync()
try:
    torch_rpa.use_compilation_cache(sys.argv[1])
except RuntimeError as error:
    print(error)
"""
    assert "before the first program on the XLA device" in run(code, tmp_path)
