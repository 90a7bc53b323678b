"""What work costs: a table of prices for each kind of device.

A plan weighs time against bytes and variance. The graph says how much work a step is (``ad.work``); a
:class:`CostModel` turns that into nanoseconds,

    nanoseconds = entries x price of their class + multiplications x price of one,

and says what it takes to store, to code, to send to the host and to start. Only ratios matter: they decide between
storing and computing again, never between feasible and infeasible.

The prices of :data:`CPU` were measured. Those of GPUs and TPUs are predictions from data sheets, which nobody has
measured. A model is handed in (``Planner(costs=...)``) or belongs to the default device (:func:`default`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax

from numpyro_rad.ad.work import COST_CLASSES, Entries, Multiplications, OneOf, Together, Work
from numpyro_rad.wording import call_text


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class CostModel:
    """Prices in nanoseconds, of one kind of device. ``dataclasses.replace`` makes another one of it.

    :ivar name: what it is priced for and where the prices are from; ``explain`` prints it.
    :ivar platform: what programs are compiled for, as JAX calls it: ``"cpu"``, ``"gpu"``, ``"tpu"``. Where that is not
        the platform of the default device (a program compiled ahead of time), the local compiler is not asked.
    :ivar entry: of an entry, by the class of what is done with it (``ad.work.CostClass``).
    :ivar product: of a multiplication and addition in a matrix product, by dtype; ``float32`` for those not in it.
    :ivar small_product: the same in a product of less than ``small_multiplications``, which does not fill the device.
    :ivar keep_per_byte: of a byte that is written once and read once.
    :ivar keep_start: what a kept array takes more to start, in each iteration of the loops around it.
    :ivar code_per_entry: of an entry that is encoded and decoded by plain rounding.
    :ivar code_start: what a code takes to start, likewise.
    :ivar make_start: what a step takes to start, run for the first time or again, likewise.
    :ivar draw_start: what random numbers that are drawn again take to compile again, some 90 ms for each array, spread
        over a hundred steps: who tries a model out waits for the compiler as well.
    :ivar offload_per_byte: of a byte that is sent to the host and fetched.
    :ivar hold_per_byte: of a byte that is held from one sweep to the other, with ``hold_from_bytes`` of residuals or
        more: allocators map large temporary memory anew in each step, and all that is held comes from main memory.
    :ivar slice_start: what it takes to start an operation once more, inside of a loop over slices.
    :ivar least_encoded_bytes: residuals below this size (over all iterations of the loops around them) are not worth
        the variance of a code.
    :ivar whole_rows: whether in codes that plans choose an entry shares its scale with its row, of up to 4096 entries:
        on a TPU, which holds arrays in tiles, parts of rows and several together are copied on the way.
    :ivar untouched_bytes: a program with fewer bytes of residuals is left to JAX's own reverse mode, unless an option
        says what to store: there is little to gain, and whatever else is done takes time to run and to compile.
    :ivar most_slices: slices that are tried of themselves, at most.
    :ivar most_added_time: without options a plan may take so much longer than the exact step, as a share of it; where
        none does with less, the program is left to JAX.
    """

    name: str
    platform: str
    entry: Mapping[str, float]
    product: Mapping[str, float]
    small_product: float = 0.0
    small_multiplications: float = 0.0
    keep_per_byte: float
    keep_start: float
    code_per_entry: float
    code_start: float
    make_start: float
    draw_start: float = 900_000.0
    offload_per_byte: float
    hold_per_byte: float = 0.0
    hold_from_bytes: int = 2**25
    slice_start: float
    least_encoded_bytes: int = 8192
    whole_rows: bool = False
    untouched_bytes: int = 2**24
    most_slices: int = 64
    most_added_time: float = 0.05

    def __post_init__(self) -> None:
        missing = [kind for kind in COST_CLASSES if kind not in self.entry]
        if missing:
            raise ValueError(f"entry: there is no price of {', '.join(missing)}. A model prices every class of work.")
        if "float32" not in self.product:
            raise ValueError("product: there is no price of float32, by which what is not priced is priced.")

    def __repr__(self) -> str:
        return call_text(self, [f"name={self.name!r}"])

    def holding(self, size: float) -> float:
        """What it takes to hold a byte from one sweep to the other, where so many residuals are held in all."""
        return self.hold_per_byte if size >= self.hold_from_bytes else 0.0

    def nanoseconds(self, work: Work) -> float:
        """About how long work takes, without what it takes to start it."""
        match work:
            case Entries(number, kind):
                return number * self.entry[kind]
            case Multiplications(number, dtype):
                small = number < self.small_multiplications
                return number * (self.small_product if small else self.product.get(dtype, self.product["float32"]))
            case Together(parts, times):
                return sum(map(self.nanoseconds, parts)) * times
            case OneOf(parts):
                return max(map(self.nanoseconds, parts))


CPU = CostModel(
    name="two CPU cores, measured",
    platform="cpu",
    entry={
        "simple": 0.05,
        "derived": 0.1,
        "ordinary": 0.3,
        "trigonometric": 1.0,
        "power": 2.0,
        "gamma": 10.0,
        "bessel": 8.0,
        "random": 12.0,
        "series": 200.0,
        "cumulative": 1.0,
        "indexed": 1.0,
        "scattered": 5.0,
        "sorted": 50.0,
    },
    product={"float32": 0.008},
    small_product=0.015,
    small_multiplications=1e7,
    keep_per_byte=0.1,
    keep_start=500.0,
    code_per_entry=1.3,
    code_start=25_000.0,
    make_start=200.0,
    offload_per_byte=10.0,
    hold_per_byte=0.7,
    slice_start=700.0,
)
"""Two CPU cores, measured. Small products do not run on all cores. Random bits took 8 to 14, relative to products, on
two machines. To start an operation inside of a loop over slices took 500 to 2600 in a recurrent network, the less the
more slices. There is no link to a host: its price is that of one with a hundredth of the memory's bandwidth."""

_INSTRUCTIONS = {
    "simple": 1,
    "derived": 1,
    "ordinary": 8,
    "trigonometric": 20,
    "power": 30,
    "bessel": 40,
    "gamma": 60,
    "random": 80,
    "series": 1500,
}
"""What a kernel does for an entry, about, the arguments of functions reduced and their polynomials included."""

_BYTES = {"cumulative": 16, "indexed": 36, "scattered": 68, "sorted": 160}
"""What goes to memory and comes from it for an entry that does not stay where it is: sectors of 32 bytes for one entry,
several passes."""

_CODE_INSTRUCTIONS = 60  # a scale, a few random bits, packing, and all of it back
_CODE_BYTES = 12  # that move for an entry of single precision, counted as below: 8 (H200) to 12 (v5e)

# How many kernels become of operations, counted in the programs that XLA compiles ahead of time for an H200 from the
# workloads of docs/benchmarks.md: 0.03 to 0.11 of a step's operations, the most of which are fused (0.6 in a loop of
# small steps, which is thereby priced too low); 0.11 to 0.14 of those of a slice; 4.5 for each code.
_KERNELS, SLICE_KERNELS, _CODE_KERNELS = 1 / 16, 1 / 8, 4  # for each operation, each of a slice, each code


def from_data_sheet(
    name: str,
    platform: str,
    *,
    bandwidth: float,
    vector: float,
    product: Mapping[str, float],
    link: float,
    launch: float,
) -> CostModel:
    """The prices of an accelerator by its data sheet: at peak, nothing but memory and arithmetic. A prediction.

    :param bandwidth: of the device's memory, in GB/s.
    :param vector: additions or multiplications outside of the matrix units, in 1e12 a second. Data sheets of GPUs count
        a multiplication and its addition as two operations, so this is half their number.
    :param product: multiplications with an addition in the matrix units, in 1e12 a second, by the dtype of a program:
        again half of what data sheets say, for the precision that JAX takes by default.
    :param link: bandwidth of the link to the host in one direction, in GB/s.
    :param launch: nanoseconds between two kernels of one program.
    """
    each = 1e-3 / vector  # nanoseconds of an instruction
    entry = {kind: n * each for kind, n in _INSTRUCTIONS.items()} | {k: n / bandwidth for k, n in _BYTES.items()}
    return CostModel(
        name=f"{name}, predicted from its data sheet",
        platform=platform,
        entry=entry,
        product={dtype: 1e-3 / rate for dtype, rate in product.items()},
        keep_per_byte=2 / bandwidth,
        keep_start=_KERNELS * launch,
        code_per_entry=max(_CODE_INSTRUCTIONS * each, _CODE_BYTES / bandwidth),
        code_start=_CODE_KERNELS * launch,
        make_start=_KERNELS * launch,
        offload_per_byte=2 / link,
        slice_start=SLICE_KERNELS * launch,
        whole_rows=platform == "tpu",
    )


_HOPPER = {"float32": 247.0, "bfloat16": 494.5, "float16": 494.5, "float64": 33.5}

A100 = from_data_sheet(
    "A100",
    "gpu",
    bandwidth=1555,
    vector=9.75,
    product={"float32": 78.0, "bfloat16": 156.0, "float16": 156.0, "float64": 9.75},
    link=32,
    launch=1500,
)
"""NVIDIA A100 (40 GB), a prediction that nobody has measured. Source: "NVIDIA A100 Tensor Core GPU Data Sheet": 1,555
GB/s, 19.5 TFLOPS of float32, 156 of TF32, 312 of bfloat16, 19.5 of float64, PCIe Gen4 of 64 GB/s both ways. Inside of
one compiled program a kernel starts in 1 to 2 microseconds (as a rule, not of a data sheet)."""

H100 = from_data_sheet("H100", "gpu", bandwidth=3350, vector=33.5, product=_HOPPER, link=64, launch=1500)
"""NVIDIA H100 SXM, a prediction that nobody has measured. Source: "NVIDIA H100 Tensor Core GPU Data Sheet": 3.35 TB/s,
67 TFLOPS of float32, 989 of TF32 and 1,979 of bfloat16 with sparsity (half of that without), 67 of float64, PCIe Gen5
of 128 GB/s both ways."""

H200 = from_data_sheet("H200", "gpu", bandwidth=4800, vector=33.5, product=_HOPPER, link=64, launch=1500)
"""NVIDIA H200 SXM, a prediction that nobody has measured. Source: "NVIDIA H200 Tensor Core GPU Data Sheet": 4.8 TB/s,
all else as the H100."""

B200 = from_data_sheet(
    "B200",
    "gpu",
    bandwidth=8000,
    vector=37.5,
    product={"float32": 550.0, "bfloat16": 1125.0, "float16": 1125.0, "float64": 18.5},
    link=64,
    launch=1500,
)
"""NVIDIA B200, a prediction that nobody has measured. Source: "NVIDIA Blackwell Architecture", HGX B200: 8 TB/s, 75
TFLOPS of float32, 1,100 of TF32 and 2,250 of bfloat16 without sparsity, 37 of float64, PCIe Gen5."""

V5E = from_data_sheet(
    "TPU v5e",
    "tpu",
    bandwidth=819,
    vector=6.0,
    product={"float32": 98.5, "bfloat16": 98.5, "float16": 98.5, "float64": 5.0},
    link=16,
    launch=500,
)
"""TPU v5e, a prediction that nobody has measured. Source: Google Cloud's documentation, "TPU v5e": 819 GB/s, 197 TFLOPS
of bfloat16, in which JAX multiplies float32 by default. No data sheet says what its vector unit, its link to the host
and the steps of a program take: 4 units in each of 1024 lanes at 1.5 GHz, PCIe Gen3 and half a microsecond are assumed.
"""

V6E = from_data_sheet(
    "TPU v6e",
    "tpu",
    bandwidth=1640,
    vector=6.0,
    product={"float32": 459.0, "bfloat16": 459.0, "float16": 459.0, "float64": 5.0},
    link=32,
    launch=500,
)
"""TPU v6e, a prediction that nobody has measured. Source: Google Cloud's documentation, "TPU v6e": 1,640 GB/s, 918
TFLOPS of bfloat16. The rest is assumed as for the v5e, with PCIe Gen4."""

_MEMBERS: dict[str, dict[str, CostModel]] = {
    "cpu": {"": CPU},
    "gpu": {"b200": B200, "h200": H200, "h100": H100, "": A100},
    "tpu": {"v6": V6E, "": V5E},
}
"""By platform: from a part of the kind of a device to its prices; the first that fits, the last for unknown kinds."""

_PLATFORMS = {"cuda": "gpu", "rocm": "gpu"}


def for_device(platform: str, device_kind: str) -> CostModel:
    """The prices for a device.

    :param platform: as ``jax.Device.platform`` says: ``"cpu"``, ``"gpu"`` (or ``"cuda"``, ``"rocm"``), ``"tpu"``. Of
        one that is not known the CPU's.
    :param device_kind: as ``jax.Device.device_kind`` says, for example ``"NVIDIA H100 80GB HBM3"``. Of a kind that is
        not known the A100's among GPUs, the v5e's among TPUs.
    """
    platform = platform.lower()
    members = _MEMBERS.get(_PLATFORMS.get(platform, platform), _MEMBERS["cpu"])
    return next(model for part, model in members.items() if part in device_kind.lower())


def default() -> CostModel:
    """The prices for the device that JAX computes on unless it is told otherwise."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    return for_device(device.platform, device.device_kind)
