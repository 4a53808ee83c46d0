"""Run README's example of the op with whatever torch_rpa is installed: ``python tests/one_op.py xla``."""

import re
import sys
from pathlib import Path

import torch_rpa

README = (Path(__file__).parent.parent / "README.md").read_text()

(device,) = sys.argv[1:]
if device == "xla":
    import torch_xla  # noqa: F401  registers the device

examples = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
(example,) = [code for code in examples if "ragged_paged_attention_update_" in code]
exec(example.replace('"cpu"', f'"{device}"'), {})
print(torch_rpa.__file__)
