"""Tasks that wait for others within one launch.

Every program takes the next task of a list by a counter, so that a task runs only when all tasks before it are done
or running: one that waits for earlier tasks cannot keep them from the machine, in whatever order programs start.
"""

import triton
import triton.language as tl


@triton.jit
def take(counter):
    """The number of the next task: 0, 1, ... by programs in the order in which they come."""
    return tl.atomic_add(counter, 1, sem="relaxed")


@triton.jit
def signal(counter):
    """Count one more task done, all it wrote before; how many came earlier. The last one sees what all wrote."""
    tl.debug_barrier()
    earlier = tl.atomic_add(counter, 1, sem="acq_rel")
    tl.debug_barrier()
    return earlier


@triton.jit
def wait(counter, tasks):
    """Until so many have signalled; what they wrote is seen afterwards."""
    while tl.atomic_add(counter, 0, sem="acquire") < tasks:
        pass
    tl.debug_barrier()


@triton.jit
def sum_slots(slots, count):
    """Σ of what tasks left in their slots, float64, in an order that depends on their number alone."""
    sums = tl.zeros([128], tl.float64)
    for k in range(0, count, 128):
        there = k + tl.arange(0, 128)
        sums += tl.load(slots + there, mask=there < count, other=0)
    return tl.sum(sums, 0)
