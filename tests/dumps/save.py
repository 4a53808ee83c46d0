"""Keep a dumped kernel's scalar program, and its modelled cycles by tpusim, for the tests of ``torch_rpa.tpu_time``.

    python tests/dumps/save.py DUMP_FOLDER v6e          needs tpusim on PYTHONPATH

The dump is one of ``compile_report(OpCase(chip, (32, 8, 128)), DUMP_FOLDER)``. Vector operations are left out; they
change nothing.
"""

import gzip
import json
import re
import sys
from pathlib import Path

from torch_rpa import workloads
from torch_rpa.tpu_time import kernel, listing

HERE = Path(__file__).parent
SIZES = {"page_size": 128, "max_num_seqs": 64, "context": 8192}


def scalar_part(text: str) -> str:
    """The listing without the operations that only concern vectors."""
    starts = [m.start() for m in listing._BUNDLE.finditer(text)]
    lines = []
    for start, stop in zip(starts, [*starts[1:], len(text)], strict=True):
        head, _, body = text[start:stop].partition("{")
        operations = [part.strip(" }\n") for part in listing._without_comments(body).split(";;")]
        kept = [part for part in operations if part and listing._operation(part) is not None]
        lines.append(head + "{ " + " ;; ".join(re.sub(r"(\w+)=(?=[%\[\d])", r"/*\1=*/", part) for part in kept) + " }")
    return "\n".join(lines) + "\n"


def cycles_by_tpusim(path: Path, chip: str) -> dict[str, int]:
    import tpusim

    simulated = tpusim.Kernel(str(kernel.other_stage(path, "final_bundles.txt")), chip)
    metadata = {name: workloads.metadata(batch, **SIZES) for name, batch in workloads.batches().items()}
    return {name: simulated.run([x.reshape(-1) for x in scalars]).cycles for name, scalars in metadata.items()}


def main(folder: Path, chip: str):
    path = kernel.listing_of_largest_kernel(folder)
    allocations = kernel.other_stage(path, "post-delay-converter.txt").read_text()
    table = "".join(m[0] + "\n" for m in listing._ALLOCATION.finditer(allocations))
    files = {"kernel-01-packed-bundles-post-ra.txt": scalar_part(path.read_text())}
    files["kernel-02-post-delay-converter.txt"] = table
    content = {"files": files, "cycles": cycles_by_tpusim(path, chip)}
    (HERE / f"{chip}.json.gz").write_bytes(gzip.compress(json.dumps(content, indent=1).encode(), mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
