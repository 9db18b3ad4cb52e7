"""The emulator that runs CUDA sources on the CPU: each function against a closed form, and proofs that it can fail."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from emulated import EmulatedLauncher, EmulationError

from sparsify_compiler.errors import KernelError
from sparsify_compiler.runtime.launch import Argument, Program

CPU = torch.device("cpu")
MISSING = EmulatedLauncher().unavailable()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
HEAD = '#include "ptx.cuh"\nextern "C" __global__ void kernel('


class Bench:
    """Compile and run a kernel written in a test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(
        self,
        body: str,
        arguments: Sequence[Argument],
        threads: int = 32,
        shared: int = 0,
        grid: tuple[int, int, int] = (1, 1, 1),
        seed: int = 0,
        **defines: int,
    ) -> None:
        """Run `body`, the parameters, a closing parenthesis and the function's block."""
        (self.folder / "test.cu").write_text(HEAD + body, encoding="utf-8")
        program = Program("test.cu", "kernel", tuple(defines.items()))
        EmulatedLauncher(seed, self.folder).launch(program, grid, threads, shared, arguments, CPU)


@pytest.fixture
def run(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def test_every_thread_of_every_block_runs_once_in_any_order(run: Bench) -> None:
    body = """int* y, int n) {
      const int i = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
      y[i * blockDim.x + threadIdx.x] = i * n + threadIdx.x;
    }"""
    for seed in range(3):
        y = ints(24, 40)
        run(body, [y, 1000], threads=40, grid=(2, 3, 4), seed=seed)
        assert torch.equal(y, torch.arange(24, dtype=torch.int32)[:, None] * 1000 + torch.arange(40, dtype=torch.int32))


def test_shuffles_and_votes_equal_their_definition(run: Bench) -> None:
    body = """int* y) {
      const int lane = threadIdx.x, v = 100 + lane;
      y[lane] = __shfl_sync(~0u, v, 5);
      y[32 + lane] = __shfl_xor_sync(~0u, v, 3);
      y[64 + lane] = __shfl_down_sync(~0u, v, 4);
      y[96 + lane] = __shfl_up_sync(~0u, v, 4);
      y[128 + lane] = __shfl_sync(~0u, v, lane + 1, 8);
      y[160 + lane] = __ballot_sync(~0u, lane % 3 == 0);
      y[192 + lane] = __any_sync(~0u, lane == 9) * 2 + __all_sync(~0u, lane == 9);
      if (lane < 8) y[224 + lane] = __shfl_xor_sync(0xffu, v, 1); else y[224 + lane] = -1;
    }"""
    lane = np.arange(32)
    expected = np.stack(
        [
            np.full(32, 105),
            100 + (lane ^ 3),
            100 + np.where(lane + 4 < 32, lane + 4, lane),
            100 + np.where(lane >= 4, lane - 4, lane),
            100 + lane // 8 * 8 + (lane + 1) % 8,
            np.full(32, sum(1 << i for i in range(0, 31, 3))),
            np.full(32, 2),
            np.where(lane < 8, 100 + (lane ^ 1), -1),
        ]
    )
    for seed in range(4):
        y = ints(8, 32)
        run(body, [y], seed=seed)
        assert np.array_equal(y.numpy(), expected)


def test_bit_functions_equal_their_definition(run: Bench) -> None:
    body = """u32* y, const u32* x, int n) {
      for (int i = 0; i < n; i++) {
        const u32 a = x[2 * i], b = x[2 * i + 1], k = i % 70;
        u32* r = y + 8 * i;
        r[0] = permute(a, b, 0x7450u + 0x8000u);
        r[1] = __byte_perm(a, b, 0xfc50u);
        r[2] = shift_right(a, b, k);
        r[3] = shift_left(a, b, k);
        r[4] = __popc(a) + 100 * __clz((int)a);
        r[5] = __ffs((int)a);
        r[6] = __brev(a);
        r[7] = min(a, b) ^ max(3, 2);
      }
    }"""
    numbers = np.random.default_rng(0).integers(0, 2**32, (100, 2), dtype=np.uint64)
    numbers[:3] = [[0, 1], [2**31, 0], [2**32 - 1, 5]]
    y = ints(100, 8)
    run(body, [y, torch.from_numpy(numbers.astype(np.uint32).view(np.int32)), 100])
    for i, (a, b) in enumerate(numbers.tolist()):
        wide, k = (b << 32) | a, i % 70
        byte = [(wide >> 8 * j) & 255 for j in range(8)]
        permuted = byte[0] | byte[5] << 8 | byte[4] << 16 | (255 if byte[7] & 128 else 0) << 24
        plain = byte[0] | byte[5] << 8 | byte[4] << 16 | byte[7] << 24
        first = 0 if a == 0 else (a & -a).bit_length()
        expected = [
            permuted,
            plain,
            (wide >> min(k, 32)) & 0xFFFFFFFF,
            ((wide << min(k, 32)) >> 32) & 0xFFFFFFFF,
            a.bit_count() + 100 * (32 - a.bit_length()),
            first,
            int(f"{a:032b}"[::-1], 2),
            min(a, b) ^ 3,
        ]
        assert y[i].numpy().view(np.uint32).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_conversions_equal_torch_for_all_16_bit_values_and_many_floats(run: Bench, dtype: torch.dtype) -> None:
    body = """float* wide, u16* narrow, const u16* halves, const float* floats, int n) {
      for (int i = threadIdx.x; i < 65536; i += 32) wide[i] = to_float(halves[i]);
      for (int i = threadIdx.x; i < n; i += 32) narrow[i] = from_float(floats[i]);
    }"""
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    ties = halves.float().view(torch.int32)[:, None] + torch.tensor([0, 1, -1, 2**12, 2**12 - 1, 2**15, 2**15 + 1])
    random = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(0))
    floats = torch.cat([ties.reshape(-1), random]).int().view(torch.float32)
    wide, narrow = torch.empty(65536), torch.empty(floats.numel(), dtype=torch.int16)
    run(body, [wide, narrow, halves.view(torch.int16), floats, floats.numel()], BF16=int(dtype == torch.bfloat16))
    same_or_nan(wide, halves.float())
    same_or_nan(narrow.view(dtype), floats.to(dtype))


def same_or_nan(found: torch.Tensor, expected: torch.Tensor) -> None:
    bits = torch.int32 if expected.dtype == torch.float32 else torch.int16
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)
    assert torch.equal(found.view(bits)[~nan], expected.view(bits)[~nan])


def test_matrices_are_loaded_as_documented(run: Bench) -> None:
    body = """u32* y, const uint4* x) {
      uint4* tile = (uint4*)shared_memory();
      tile[threadIdx.x] = x[threadIdx.x];
      __syncwarp();
      u32 r[4];
      load_matrices(r, shared_address(tile + threadIdx.x));
      for (int m = 0; m < 4; m++) y[threadIdx.x * 4 + m] = r[m];
    }"""
    x = torch.arange(256, dtype=torch.int16)
    y = ints(32, 4)
    run(body, [y, x], shared=512)
    for lane in range(32):
        for m in range(4):
            first = (8 * m + lane // 4) * 8 + 2 * (lane % 4)
            assert y[lane, m].item() == first + ((first + 1) << 16)


def fragments(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lay out a (16, 16) and b (8 * registers, 8) as the registers of 32 lanes, from the PTX manual's figures."""
    registers_a, registers_b = np.zeros((32, 4, 2), a.dtype), np.zeros((32, b.shape[0] // 8, 2), b.dtype)
    for lane in range(32):
        q, c = divmod(lane, 4)
        for i in range(8):  # a0 .. a7
            row = q if i in (0, 1, 4, 5) else q + 8
            registers_a[lane, i // 2, i % 2] = a[row, 2 * c + i % 2 + (8 if i >= 4 else 0)]
        for i in range(b.shape[0] // 4):
            registers_b[lane, i // 2, i % 2] = b[2 * c + i % 2 + 8 * (i // 2), q]
    return registers_a, registers_b


def accumulator(y: torch.Tensor) -> np.ndarray:
    """Read d (16, 8) from 4 registers of 32 lanes."""
    d = np.zeros((16, 8))
    for lane in range(32):
        for i in range(4):
            d[lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2] = y[lane, i]
    return d


def test_the_dense_product_of_tensor_cores_equals_numpy(run: Bench) -> None:
    body = """float* y, const u32* a, const u32* b) {
      float d[4] = {1, 1, 1, 1};
      u32 own[4];
      for (int i = 0; i < 4; i++) own[i] = a[threadIdx.x * 4 + i];
      multiply(d, own, b[threadIdx.x * 2], b[threadIdx.x * 2 + 1]);
      for (int i = 0; i < 4; i++) y[threadIdx.x * 4 + i] = d[i];
    }"""
    random = np.random.default_rng(1)
    a, b = (random.standard_normal(shape).astype(np.float16) for shape in ((16, 16), (16, 8)))
    y = torch.empty(32, 4)
    run(body, [y, *map(torch.from_numpy, fragments(a, b))])
    exact = a.astype(np.float64) @ b.astype(np.float64) + 1
    np.testing.assert_allclose(accumulator(y), exact, rtol=1e-6, atol=1e-6)  # one rounding to float32


@pytest.mark.parametrize("selector", [0, 1])
def test_the_sparse_product_of_tensor_cores_equals_numpy(run: Bench, selector: int) -> None:
    body = """float* y, const uint4* a, const u32* b, const u32* places) {
      float d[4] = {0, 0, 0, 0};
      u32 own[4];
      for (int i = 0; i < 4; i++) own[i] = b[threadIdx.x * 4 + i];
      multiply_sparse<SELECTOR>(d, a[threadIdx.x], own, places[threadIdx.x]);
      for (int i = 0; i < 4; i++) y[threadIdx.x * 4 + i] = d[i];
    }"""
    random = np.random.default_rng(2)
    stored, b = (random.standard_normal(shape).astype(np.float16) for shape in ((16, 16), (32, 8)))
    dense, places = np.zeros((16, 32)), np.full(32, 0xFFFFFFFF, np.uint64)
    words = np.zeros((8, 2), np.uint64)
    for row in range(16):
        for group in range(8):
            first, second = sorted(random.choice(4, 2, replace=False))
            dense[row, 4 * group + first], dense[row, 4 * group + second] = stored[row, 2 * group : 2 * group + 2]
            at = 16 * (row // 8) + 4 * (group % 4)
            words[row % 8, group // 4] |= np.uint64((first | second << 2) << at)
    for q in range(8):
        places[4 * q + 2 * selector : 4 * q + 2 * selector + 2] = words[q]  # all other lanes hold nonsense
    y = torch.empty(32, 4)
    registers = [torch.from_numpy(r) for r in fragments(stored, b)]
    run(body, [y, *registers, torch.from_numpy(places.astype(np.uint32).view(np.int32))], SELECTOR=selector)
    np.testing.assert_allclose(accumulator(y), dense @ b.astype(np.float64), rtol=1e-6, atol=1e-6)
    swapped = torch.from_numpy((places ^ np.uint64(15)).astype(np.uint32).view(np.int32))
    with pytest.raises(EmulationError, match="do not ascend"):
        run(body, [y, *registers, swapped], SELECTOR=selector)


COPIES = """float* y, const float* x, int valid) {
  float* tile = (float*)shared_memory();
  const u32 at = shared_address(tile) + 16 * threadIdx.x;
  copy_async(at, x + 4 * threadIdx.x);
  commit_copies();
  copy_async_kept(at + 512, x + 4 * threadIdx.x, valid);
  commit_copies();
  wait_copies<PENDING>();
  __syncthreads();
  const int other = 31 - threadIdx.x;
  for (int i = 0; i < 4; i++) y[4 * threadIdx.x + i] = tile[4 * other + i] + tile[128 + 4 * other + i];
  __syncthreads();
  wait_copies<0>();
}"""


def test_copies_arrive_with_zeros_behind_the_valid_bytes(run: Bench) -> None:
    x, y = torch.randn(32, 4), torch.empty(32, 4)
    for valid in (0, 4, 8, 16):
        run(COPIES, [y, x, valid], shared=1024, PENDING=0)
        expected = x + torch.where(torch.arange(4) * 4 < valid, x, 0)
        assert torch.equal(y, expected.flip(0))


def test_a_missing_wait_reads_nan(run: Bench) -> None:
    x, y = torch.randn(32, 4), torch.zeros(32, 4)
    run(COPIES, [y, x, 16], shared=1024, PENDING=1)
    assert y.isnan().all()
    with pytest.raises(EmulationError, match="ended with 2 background copies that it never waited for"):
        run(COPIES.replace("wait_copies<0>();", "").replace("wait_copies<PENDING>();", ""), [y, x, 16], shared=1024)


def test_a_missing_barrier_shows_for_most_orders_of_threads(run: Bench) -> None:
    body = """float* y) {
      float* s = (float*)shared_memory();
      s[threadIdx.x] = 1.0f;
      BARRIER
      y[threadIdx.x] = s[(threadIdx.x + 32) % 64];
    }"""
    wrong = 0
    for seed in range(8):
        y = torch.zeros(64)
        run(body.replace("BARRIER", "__syncthreads();"), [y], threads=64, shared=256, seed=seed)
        assert torch.equal(y, torch.ones(64))
        run(body.replace("BARRIER", ""), [y], threads=64, shared=256, seed=seed)
        wrong += bool(y.isnan().any())
    assert wrong == 8  # the thread that runs first reads what no other has written


def test_reusing_a_stage_that_others_still_read_shows(run: Bench) -> None:
    body = """float* y, const float* x) {
      float* tile = (float*)shared_memory();
      const u32 at = shared_address(tile) + 16 * threadIdx.x;
      float sum = 0;
      for (int k = 0; k < 4; k++) {
        copy_async(at, x + 4 * (k * 64 + threadIdx.x));
        commit_copies();
        wait_copies<0>();
        __syncthreads();
        for (int i = 0; i < 256; i++) sum += tile[i];
        BARRIER
      }
      y[threadIdx.x] = sum;
    }"""
    x, y = torch.arange(4.0)[:, None].repeat(1, 256), torch.zeros(64)
    wrong = 0
    for seed in range(8):
        run(body.replace("BARRIER", "__syncthreads();"), [y, x], threads=64, shared=1024, seed=seed)
        assert torch.equal(y, torch.full((64,), 6 * 256.0))
        run(body.replace("BARRIER", ""), [y, x], threads=64, shared=1024, seed=seed)
        wrong += not torch.equal(y, torch.full((64,), 6 * 256.0))
    assert wrong == 8


CLUSTER = """float* y) {
  float* s = (float*)shared_memory();
  s[threadIdx.x] = 100.0f * blockIdx.y + threadIdx.x;
  BARRIER
  float sum = 0;
  for (u32 rank = 0; rank < CLUSTER; rank++) sum += read_cluster(shared_address(s + threadIdx.x), rank);
  AFTER
  y[(blockIdx.y * gridDim.x + blockIdx.x) * 32 + threadIdx.x] = sum;
}"""


def cluster_kernel(before: str = "wait_cluster();", after: str = "wait_cluster();") -> str:
    return CLUSTER.replace("BARRIER", before).replace("AFTER", after)


def test_blocks_of_a_cluster_read_each_others_memory(run: Bench) -> None:
    head = "float* y); // __cluster_dims__(1, CLUSTER, 1)\n"
    y = torch.zeros(8, 3, 32)
    for seed in range(4):
        body = f'{head}extern "C" __global__ void kernel({cluster_kernel()}'
        run(body, [y], grid=(3, 8, 1), shared=128, seed=seed, CLUSTER=4)
        blocks = torch.arange(8).view(2, 4).float().sum(dim=1) * 100
        expected = blocks.repeat_interleave(4)[:, None, None] + 4 * torch.arange(32.0)
        assert torch.equal(y, expected.expand(8, 3, 32))


@pytest.mark.parametrize(("before", "after"), [("", "wait_cluster();"), ("wait_cluster();", "")])
def test_a_missing_cluster_barrier_shows(run: Bench, before: str, after: str) -> None:
    head = "float* y); // __cluster_dims__(1, CLUSTER, 1)\n"
    y, wrong = torch.zeros(4, 1, 32), 0
    for seed in range(8):
        try:
            body = f'{head}extern "C" __global__ void kernel({cluster_kernel(before, after)}'
            run(body, [y], grid=(1, 4, 1), shared=128, seed=seed, CLUSTER=4)
            wrong += bool(y.isnan().any())
        except EmulationError as error:
            assert "of the cluster has ended" in str(error)  # noqa: PT017 - either is a right answer
            wrong += 1
    assert wrong >= 4


WRONG = (
    ("int* y) { y[threadIdx.x + 1] = 1; }", "touches byte 128 of argument 0, a tensor of 128 bytes"),
    ("int* y) { y[(int)threadIdx.x - 1] = 1; }", "something wrote at byte -4 of a tensor of 128 bytes|byte -4 of arg"),
    ("int* y) { y[0] = ((int*)shared_memory())[16]; }", "of the 64 bytes of shared memory|^$"),
    ("int* y) { u32 r[4]; load_matrices(r, shared_address(shared_memory()) + 56); }", "bytes 56 to 72 of the 64 bytes"),
    ("int* y) { u32 r[4]; load_matrices(r, shared_address(shared_memory()) + 8); }", "byte 8 .* not aligned to 16"),
    ("int* y) { copy_async(shared_address(shared_memory()), y + 1); }", "not a multiple of 16"),
    ("int* y) { copy_async(shared_address(shared_memory()) + 64, y); }", "bytes 64 to 80 of the 64 bytes"),
    ("int* y) { y[0] = *(int*)((char*)y + 2 * (blockIdx.x + 1)); }", "misaligned or null address at test.cu:2"),
    ("int* y) { int v[4] = {1, 2, 3, 4}; y[0] = v[threadIdx.x]; }", "an index outside a local array at test.cu:2"),
    (
        "int* y) { int n = 1 << 30; n += n + blockIdx.x; n += n; y[0] = n; }",
        "a signed (sum|product) that overflows",
    ),
    ("int* y) { y[0] = 1 << (blockDim.x + y[0] - y[0]); }", "a shift by"),
    ("int* y) { y[0] = 5 / (int)blockIdx.x; }", "division by zero"),
    ("int* y) { if (threadIdx.x < 16) __syncwarp(); }", "lane .* of its mask ffffffff has ended|deadlock"),
    ("int* y) { if (threadIdx.x < 16) __syncthreads(); else __syncwarp(); }", "deadlock: 16 threads wait in __sync"),
    (
        "int* y) { u32 a[4] = {}; float d[4] = {};\n if (threadIdx.x < 16) multiply(d, a, 0, 0);\n"
        " else multiply(d, a, 0, 0); }",
        "multiply at line [34], while thread .* waits in it at line [34]: diverged",
    ),
    ("int* y) { y[0] = __shfl_sync(1u << threadIdx.x, 1, 3); }", "a shuffle reads lane 3, which is not in its mask"),
    ("int* y) { y[0] = __shfl_sync(1u, 1, 0); }", "is not in its own mask"),
    ("int* y) { wait_cluster(); }", "names no cluster"),
    ("int* y) { int v = y[0]; y[v] = 1; y[0] = *(const int*)(const u8*)nullptr; }", "null|touches"),
    ("float* y, int n) {}", "has 2 parameters; found 1 arguments"),
    ("int y) {}", "parameter 0 takes an int; found a tensor"),
    ("float y) {}", "parameter 0 takes a type that no argument has"),
)


@pytest.mark.parametrize(("body", "reason"), WRONG)
def test_what_a_gpu_would_not_survive_is_told_with_its_place(run: Bench, body: str, reason: str) -> None:
    y = ints(32)
    if reason.endswith("|^$"):  # past the end but within the 1024 bytes of alignment: NaN, not a trap
        run(body, [y], shared=64)
        assert y[0] == -1
        return
    with pytest.raises(EmulationError, match=reason):
        run(body, [y], shared=64)
    run("int* y) { y[threadIdx.x] = 7; }", [y])  # and the machine still works
    assert torch.equal(y, torch.full((32,), 7, dtype=torch.int32))


def test_outputs_are_poisoned_and_inputs_are_not(run: Bench) -> None:
    x, y = torch.ones(32), torch.ones(33)
    run("float* y, const float* x) { y[threadIdx.x] = x[threadIdx.x]; }", [y, x])
    assert torch.equal(y[:32], torch.ones(32))
    assert y[32].isnan()


def test_views_of_one_tensor_share_memory_and_strides_are_kept(run: Bench) -> None:
    base = torch.arange(64.0)
    run("float* y, const float* x) { y[2 * threadIdx.x] = 2 * x[0]; }", [base[::2][16:], base[3:4]], threads=16)
    expected = torch.arange(64.0)
    expected[32::2] = 6.0
    assert torch.equal(base, expected)


def test_tensors_that_lie_side_by_side_are_told_apart(run: Bench) -> None:
    base = torch.arange(96, dtype=torch.int32)
    first, second, third = base[:32], base[32:64], base[64:]
    run("int* y, const int* x, const int* z) { y[threadIdx.x] = x[threadIdx.x] + z[0]; }", [second, first, third])
    expected = torch.cat([torch.arange(32), torch.arange(32) + 64, torch.arange(64, 96)])
    assert torch.equal(base, expected.int())


def test_what_no_gpu_would_launch_is_refused(run: Bench) -> None:
    y, body = ints(4), "int* y) {}"
    for reason, changed in (
        ("grid", {"grid": (0, 1, 1)}),
        ("threads", {"threads": 1025}),
        ("shared memory", {"shared": 2**20}),
    ):
        with pytest.raises(KernelError, match=reason):
            run(body, [y], **changed)
    with pytest.raises(KernelError, match="no int32 holds"):
        run("int n) {}", [2**31])
    with pytest.raises(KernelError, match=r"does not compile for the emulator: .*nothing_like_it"):
        run("int* y) { nothing_like_it(); }", [y])
