r"""A model on paper, not a measurement: what a step takes on GPUs that nobody had at hand.

    python -m benchmarks.growth.paper_model                   # the tables
    python -m benchmarks.growth.paper_model --tokens 32768    # another batch

Bytes per parameter, gradients per step and passes over vectors are counted on real steps here
(``constants.json``); the GPU is that of its data sheet; what neither says is an assumption, and
stands in ``Assumptions``. N is the number of parameters of v, W of GPUs, T of tokens per GPU.

.. math::
    t = e\,\frac{8 N T}{\eta P} + \frac{b_v N'}{B} + \max\Bigl(0, \frac{s}{C} - t_{hidden}\Bigr)

with e gradients per step, each of 8 N T operations (6 N T of a forward and a backward pass, Kaplan
et al. 2020, and 2 N T to recompute activations from checkpoints), P the GPU's speed, eta the share
of it that is reached; b_v bytes of vector work per parameter, N' = N or N / W of shards, B the
memory's speed; s bytes sent by each GPU (``wire.py``), C its link's speed, and t_hidden what
sending hides behind: a backward pass where plain training overlaps (DDP), all gradients with FSDP2,
nothing in our one message of an evaluation.

Memory: the measured peak of each parameter's bytes, of which FSDP2 leaves the W-th part and the
gathered layers, and activations of checkpointing: the input of each layer and, in one layer at a
time, 34 bytes per token and hidden unit (Korthikanti et al. 2022, with attention that stores no
scores). A layer has 12 h^2 parameters, and h = 128 L.

The upper level is small (a weight per source, not one for each of billions of samples).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from benchmarks.growth import constants
from benchmarks.growth.processes import OURS, PARALLEL, PLAIN, SHARDED
from benchmarks.growth.wire import PASSES
from examples.shared import command

BYTES = {"float32": 4, "bfloat16": 2}
KINDS = (PARALLEL, SHARDED)
METHODS = (OURS, PLAIN)


@dataclass(frozen=True)
class Gpu:
    """NVIDIA H100 SXM, by its data sheet (nvidia.com/en-us/data-center/h100).

    The network is that of DGX H100: one ConnectX-7 of 400 Gb/s for each GPU.
    """

    name: str = "H100 SXM"
    memory: float = 80e9
    bandwidth: float = 3.35e12
    flops: float = 989e12
    """bf16 on tensor cores, dense (the sheet's 1,979e12 are with sparsity)."""
    link: float = 450e9
    """NVLink in one direction; the sheet's 900e9 are both."""
    network: float = 50e9
    """Beyond the node of eight."""
    node: int = 8


@dataclass(frozen=True)
class Assumptions:
    """What no sheet and no count says."""

    tokens: int = 8192
    """T, per GPU and evaluation; the upper batch is as large."""
    reached: float = 0.4
    """eta, of the GPU's speed in matrix products."""
    kept: float = 0.8
    """Of the speed of memory and links."""
    reserve: float = 0.9
    """Of the memory that tensors may fill: the rest is fragments, kernels, NCCL's buffers."""


H100, ASSUMED = Gpu(), Assumptions()


@dataclass(frozen=True)
class Setting:
    """One cell: which step, of how many parameters, on how many GPUs."""

    method: str
    parameters: float
    world: int
    kind: str = SHARDED
    dtype: str = "bfloat16"
    assumed: Assumptions = ASSUMED
    gpu: Gpu = H100

    @property
    def counted(self) -> dict[str, float]:
        """``constants.json`` of this step."""
        return constants.read()[self.dtype][self.method]

    # Shape of the network.

    @property
    def layers(self) -> int:
        """L of a transformer with h = 128 L and 12 h^2 parameters in each layer."""
        return max(1, round((self.parameters / (12 * 128**2)) ** (1 / 3)))

    @property
    def layer(self) -> float:
        """Parameters of one layer."""
        return self.parameters / self.layers

    @property
    def width(self) -> float:
        """H."""
        return math.sqrt(self.layer / 12)

    # Bytes held.

    def vectors(self, layers: float | None = None) -> float:
        """Bytes of everything that has the size of v, at the peak of a step."""
        counted = self.counted
        if self.world == 1:
            return counted["peak"] * self.parameters
        if self.kind == PARALLEL:
            return counted["peak, DDP"] * self.parameters
        layer = BYTES[self.dtype] * self.parameters / (layers or self.layers)
        part = counted["peak, FSDP2"] * self.parameters / self.world
        return part + constants.GATHERED * layer

    @property
    def activations(self) -> float:
        """Bytes of checkpointed activations and of the layer at work."""
        per_token = self.width * (BYTES["bfloat16"] * self.layers + 34)
        return self.assumed.tokens * per_token

    @property
    def held(self) -> float:
        """Bytes per GPU."""
        return self.vectors() + self.activations

    @property
    def fits(self) -> bool:
        return self.held <= self.assumed.reserve * self.gpu.memory

    # Bytes on the wire.

    @property
    def gradients(self) -> float:
        """Of a step, a probe in every 20th among them."""
        return self.counted["gradients, mean"]

    def messages(self, probes: float = 1 / constants.PERIOD) -> dict[str, float]:
        """Payload of a step in bytes, by kind of message; u and losses left out.

        ``probes``: how many the step has.
        """
        size, v = BYTES[self.dtype], self.parameters
        if self.kind == PARALLEL:
            # r, grad_v f, H q and a probe's H p, in at least float32; of plain training r.
            vectors = (3 + probes) * max(size, 4) if self.method == OURS else size
            return {"all-reduce": vectors * v}
        least = self.counted["gradients"]
        each = (self.gradients - least) * constants.PERIOD
        # Each gradient gathers v twice, forward and backward, and is scattered.
        passes = (least + probes * each) * size * v
        return {"all-gather": 2 * passes, "reduce-scatter": passes}

    def sent_with(self, probes: float) -> float:
        """Bytes that each GPU sends, by rings, in a step of so many probes."""
        ring = (self.world - 1) / self.world
        return sum(PASSES[kind] * payload * ring for kind, payload in self.messages(probes).items())

    @property
    def sent(self) -> float:
        """Bytes that each GPU sends in a step, by rings."""
        return self.sent_with(1 / constants.PERIOD)

    # Seconds.

    @property
    def gradient_seconds(self) -> float:
        """Of one gradient."""
        speed = self.assumed.reached * self.gpu.flops
        if self.dtype == "float32":
            speed /= 2  # TF32: 494.5e12 on the sheet, dense
        return 8 * self.parameters * self.assumed.tokens / speed

    @property
    def vector_seconds(self) -> float:
        """Of passes over vectors like v."""
        share = self.world if self.kind == SHARDED else 1
        moved = self.counted["vector"] * self.parameters / share
        return moved / (self.assumed.kept * self.gpu.bandwidth)

    @property
    def wire_seconds(self) -> float:
        """Of sending, whatever it hides behind."""
        link = self.gpu.link if self.world <= self.gpu.node else self.gpu.network
        return self.sent / (self.assumed.kept * link)

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of a step: gradients, vectors, and what shows of the wire."""
        gradients = self.gradients * self.gradient_seconds
        hidden = gradients if self.kind == SHARDED else 0.0
        if self.kind == PARALLEL and self.method == PLAIN:
            hidden = 0.75 * gradients  # 6 of 8 N T are backward, with what is recomputed
        shown = max(0.0, self.wire_seconds - hidden)
        return {"gradients": gradients, "vectors": self.vector_seconds, "wire": shown}

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def largest(
    method: str, world: int, kind: str, dtype: str = "bfloat16", assumed: Assumptions = ASSUMED
) -> float:
    """The most parameters that fit, to 1 %."""
    low, high = 1e6, 1e13
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        if Setting(method, middle, world, kind, dtype, assumed).fits:
            low = middle
        else:
            high = middle
    return low


def settings(sizes: list[float], worlds: list[int]) -> list[tuple[float, int, str]]:
    """Rows: one GPU without messages, several with both kinds."""
    return [(n, w, k) for n in sizes for w in worlds for k in (KINDS if w > 1 else KINDS[:1])]


def table(sizes: list[float], worlds: list[int], dtype: str, assumed: Assumptions = ASSUMED) -> str:
    """Ours / plain in each cell."""
    lines = [
        "| parameters | GPUs | | GB per GPU | GB sent per GPU | seconds | of plain | the most |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for n, world, kind in settings(sizes, worlds):
        ours, plain = (Setting(m, n, world, kind, dtype, assumed) for m in METHODS)
        cells: list[Any] = [f"{n:.0e}", world, kind if world > 1 else ""]
        cells.append(f"{_held(ours)} / {_held(plain)}")
        cells.append(f"{ours.sent / 1e9:.3g} / {plain.sent / 1e9:.3g}")
        cells.append(f"{ours.seconds:.3g} / {plain.seconds:.3g}")
        cells.append(f"{ours.seconds / plain.seconds:.2f}" if ours.fits else "does not fit")
        parts = ours.parts
        cells.append(max(parts, key=lambda name: parts[name]))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def _held(cell: Setting) -> str:
    text = f"{cell.held / 1e9:.3g}"
    return text if cell.fits else f"**{text}**"


def limits(worlds: list[int], assumed: Assumptions = ASSUMED) -> str:
    """Where it breaks: the largest v that fits."""
    lines = ["| GPUs | | dtype of v | ours | plain |", "|---|---|---|---|---|"]
    for world in worlds:
        for kind in KINDS if world > 1 else KINDS[:1]:
            for dtype in constants.DTYPES:
                ours, plain = (largest(m, world, kind, dtype, assumed) for m in METHODS)
                where = kind if world > 1 else ""
                lines.append(f"| {world} | {where} | {dtype} | {ours:.2g} | {plain:.2g} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = command.parser(__spec__, __doc__)
    add = parser.add_argument
    add("--sizes", nargs="+", type=float, default=[1e8, 1e9, 1e10], help="parameters of v")
    add("--gpus", nargs="+", type=command.count, default=[1, 8, 64], help="(1 8 64)")
    add("--dtype", choices=constants.DTYPES, default="bfloat16", help="of v (bfloat16)")
    add("--tokens", type=command.count, default=ASSUMED.tokens, help="per GPU (8192)")
    options = parser.parse_args()
    assumed = Assumptions(tokens=options.tokens)
    print("A model on paper, not a measurement. Ours / plain; bold does not fit.\n")
    print(table(options.sizes, options.gpus, options.dtype, assumed))
    print(limits(options.gpus, assumed))


if __name__ == "__main__":
    main()
