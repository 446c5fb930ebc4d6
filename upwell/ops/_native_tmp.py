import ctypes, os
from concurrent.futures import ThreadPoolExecutor
import torch
_lib = ctypes.CDLL("/tmp/hc.so") if os.path.exists("/tmp/hc.so") else None
_pool = ThreadPoolExecutor(1)
def library(): return _lib
def parallel_ranges(n, run):
    if torch.get_num_threads() == 1 or n < 256: return run(0, n)
    half = n // 2
    f = _pool.submit(run, half, n); run(0, half); f.result()
