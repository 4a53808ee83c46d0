"""The native CPU kernel beside what PyTorch offers, side by side in one run.

    python -m benchmarks.bench_cpu [--cases decode prefill mixed] [--heads llama-3-8b] [--dtypes float32] [--repeats 7]

Cases: decode (32 sequences at 128 to 4096 tokens), prefill (512 new tokens after 0 to 8192), mixed (31 decodes and a
chunk of 256). Ways, each given what it needs in the form that it likes best, so that no set-up is timed:

    native    torch.ops.rpa.ragged_paged_attention on pages
    padded    scaled_dot_product_attention on a padded batch: K and V [sequences, heads, longest, dim], and a mask
    loop      for each sequence: gather its pages, then scaled_dot_product_attention
    flex      FlexAttention, compiled, on the pages with a paged block mask (--flex; decode only, in pages of 128)
    stream    a plain read (a dot product with itself, float32) of as many bytes as the keys and values that are needed

Rounds go through all ways in turn; each cell is the best round, and a ratio is that way's time over native's. Before
each call 300 MB of other memory are read, as other layers' weights and pages would be in a model: caches hold nothing.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

import torch_rpa  # noqa: F401  registers the ops
from torch_rpa import workloads

MODELS = ("llama-3-8b", "smollm2-135m")
PAGE_SIZE = 16
COLD_BYTES = 300 * 2**20


def cases():
    """Name -> [(q_len, kv_len), ...]."""
    decode = [(1, int(n)) for n in torch.linspace(128, 4096, 32)]
    found = {"decode 32 x 128-4096": decode}
    for context in (0, 512, 2048, 8192):
        found[f"prefill 512 at {context}"] = [(512, 512 + context)]
    found["mixed 31 x 1, 1 x 256"] = [*decode[:-1], (256, 2048)]
    return found


class Batch:
    """One case's pages and metadata, and the same keys and values padded."""

    def __init__(self, seqs, heads, dtype):
        num_q_heads, num_kv_heads, head_dim = heads
        self.seqs, self.heads, self.scale = seqs, heads, head_dim**-0.5
        counts = [-(-kv_len // PAGE_SIZE) for _, kv_len in seqs]
        order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)).int()
        self.table = torch.full((len(seqs), max(counts)), -1, dtype=torch.int32)
        for row, pages in zip(self.table, order.split(counts), strict=True):
            row[: len(pages)] = pages
        self.pages = torch.empty(sum(counts), PAGE_SIZE, 2 * num_kv_heads, head_dim, dtype=dtype).normal_()
        self.q = torch.randn(sum(q_len for q_len, _ in seqs), num_q_heads, head_dim).to(dtype)
        q_lens, kv_lens = torch.tensor(seqs, dtype=torch.int32).unbind(1)
        starts = F.pad(q_lens.cumsum(0).int(), (1, 0))
        self.metadata = kv_lens.contiguous(), self.table, starts, torch.tensor([len(seqs)], dtype=torch.int32)

    def needed_bytes(self):
        return sum(kv_len for _, kv_len in self.seqs) * self.pages[0, 0].nbytes

    def gather(self, s):
        """K and V of sequence s, each [num_kv_heads, kv_len, head_dim], copied out of its pages."""
        kv_len = self.seqs[s][1]
        pages = self.table[s, : -(-kv_len // PAGE_SIZE)]
        kv = self.pages.index_select(0, pages).flatten(0, 1)[:kv_len]
        return kv[:, 0::2].transpose(0, 1), kv[:, 1::2].transpose(0, 1)


def native(batch):
    return lambda: torch.ops.rpa.ragged_paged_attention(batch.q, batch.pages, *batch.metadata, sm_scale=batch.scale)


def visible(q_len, kv_len, longest_q, longest_kv):
    """[longest_q, longest_kv]: which keys each row of one sequence sees."""
    positions = torch.arange(longest_q)[:, None] + kv_len - q_len
    return (torch.arange(longest_kv)[None] <= positions) & (torch.arange(longest_kv)[None] < kv_len)


def padded(batch):
    num_q_heads, num_kv_heads, head_dim = batch.heads
    longest_q, longest_kv = (max(lens) for lens in zip(*batch.seqs, strict=True))
    shape = (len(batch.seqs), num_kv_heads, longest_kv, head_dim)
    k, v = torch.zeros(2, *shape, dtype=batch.q.dtype)
    q = torch.zeros(len(batch.seqs), num_q_heads, longest_q, head_dim, dtype=batch.q.dtype)
    for s, (q_len, kv_len) in enumerate(batch.seqs):
        k[s, :, :kv_len], v[s, :, :kv_len] = batch.gather(s)
        first = int(batch.metadata[2][s])
        q[s, :, :q_len] = batch.q[first : first + q_len].transpose(0, 1)
    mask = torch.stack([visible(q_len, kv_len, longest_q, longest_kv) for q_len, kv_len in batch.seqs])[:, None]
    return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=batch.scale, enable_gqa=True)


def loop(batch):
    masks = [None if q == 1 or q == kv else visible(q, kv, q, kv) for q, kv in batch.seqs]
    starts = batch.metadata[2].tolist()

    def call():
        outs = []
        for s, (q_len, kv_len) in enumerate(batch.seqs):
            k, v = batch.gather(s)
            q = batch.q[starts[s] : starts[s + 1]].transpose(0, 1)[None]
            out = F.scaled_dot_product_attention(
                q,
                k[None],
                v[None],
                attn_mask=masks[s],
                is_causal=q_len == kv_len > 1,
                scale=batch.scale,
                enable_gqa=True,
            )
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    return call


def flex(batch):
    """FlexAttention over the pages as one long sequence, each batch entry masked to its own pages."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    size = 128
    _, num_kv_heads, head_dim = batch.heads
    counts = torch.tensor([-(-kv_len // size) for _, kv_len in batch.seqs], dtype=torch.int32)
    total = int(counts.sum())
    kv = torch.randn(2, 1, num_kv_heads, total * size, head_dim).to(batch.q.dtype)
    owner = torch.repeat_interleave(torch.arange(len(batch.seqs)), counts)
    first = F.pad(counts.cumsum(0), (1, 0))[:-1]
    logical = torch.arange(total) - first[owner]
    indices = torch.zeros(len(batch.seqs), 1, 1, total, dtype=torch.int32)
    for s, count in enumerate(counts.tolist()):
        indices[s, 0, 0, :count] = torch.arange(int(first[s]), int(first[s]) + count)
    lens = batch.metadata[0].long()

    def mask_mod(b, h, q_index, kv_index):
        page = kv_index // size
        return (owner[page] == b) & (logical[page] * size + kv_index % size < lens[b])

    mask = BlockMask.from_kv_blocks(
        counts[:, None, None],
        indices,
        BLOCK_SIZE=(1, size),
        mask_mod=mask_mod,
        seq_lengths=(1, total * size),
    )
    compiled = torch.compile(flex_attention)
    q = batch.q[:, :, None]
    k, v = (x.expand(len(batch.seqs), -1, -1, -1) for x in kv)
    return lambda: compiled(q, k, v, block_mask=mask, scale=batch.scale, enable_gqa=True)


def stream(batch):
    memory = torch.ones(batch.needed_bytes() // 4)
    return lambda: torch.dot(memory, memory)


WAYS = {"native": native, "padded": padded, "loop": loop, "stream": stream}


def measure(ways, repeats):
    """Best milliseconds of each way, all in turn in each round."""
    cold = torch.ones(COLD_BYTES // 4)
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(repeats):
        for name, call in ways.items():
            cold.sum()
            start = time.perf_counter()
            call()
            best[name] = min(best[name], (time.perf_counter() - start) * 1e3)
    return best


def ways_of(batch, with_flex):
    found = {name: make(batch) for name, make in WAYS.items()}
    if with_flex and all(q_len == 1 for q_len, _ in batch.seqs):
        found["flex"] = flex(batch)
        found["flex"]()  # compiles
    return found


def print_row(label, best):
    native_ms = best["native"]
    cells = [f"{native_ms:9.2f}"] + [f"{best[n] / native_ms:8.2f}" for n in ("padded", "loop")]
    cells.append(f"{best['stream'] / native_ms:8.3f}")
    cells.append(f"{best['flex'] / native_ms:8.2f}" if "flex" in best else f"{'-':>8}")
    tqdm.write(f"| {label:46} | {' | '.join(cells)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["decode", "prefill", "mixed"])
    parser.add_argument("--heads", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--flex", action="store_true", help="FlexAttention too, in decode (compiling takes a minute)")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    chosen = [
        (name, seqs, heads, dtype)
        for heads in args.heads
        for dtype in args.dtypes
        for name, seqs in cases().items()
        if name.split()[0] in args.cases
    ]
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}; x times native's time")
    print(f"| {'':46} | native ms |   padded |     loop |   stream |     flex |\n|---|---:|---:|---:|---:|---:|")
    with tqdm(total=len(chosen), unit="case", leave=False) as progress:
        for name, seqs, heads, dtype in chosen:
            progress.set_description(f"{heads} {dtype} {name}")
            batch = Batch(seqs, workloads.MODELS[heads].heads, getattr(torch, dtype))
            best = measure(ways_of(batch, args.flex), args.repeats)
            progress.update()
            print_row(f"{heads} {dtype} {name}", best)


if __name__ == "__main__":
    main()
