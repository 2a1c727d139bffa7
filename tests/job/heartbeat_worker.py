"""Joins as a rank, then does what its argument says: waits in a collective, dies, stops, fails, sleeps, leaves late."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta

from mobius_train.cli import run_rank
from mobius_train.errors import Interrupted
from mobius_train.job import environment


def asleep() -> None:
    time.sleep(600)


def main() -> None:
    launch = environment.prepare()
    from mobius_train.job.distributed import Distributed
    from mobius_train.job.heartbeat import Heartbeat

    # Ten times as fast as in earnest.
    Heartbeat.__init__.__defaults__ = (0.4,)
    how, who = sys.argv[1], int(sys.argv[2])
    meeting = timedelta(seconds=60 if how != "absent" else 3)
    with Distributed(launch, meeting, {"batch": 4, "step": 8, "save": 4}) as distributed:
        distributed.barrier()
        distributed.watch.enter("step" if "sleep" in how else "", "step 7, in a collective")
        if launch.rank == who:
            if how == "fail":
                raise ValueError("no such luck")
            if how == "sleep":
                distributed.watch.enter("batch", "step 7, loading a batch")
                asleep()
            if how == "sleep in the same phase":
                # Its limit ends after that of the ranks that wait for it.
                time.sleep(3)
                distributed.watch.enter("step", "step 7, before a collective")
                asleep()
            if how == "sleep beside":
                distributed.watch.enter("", "step 7, in a collective")
                with distributed.watch.beside("save", "writing checkpoint-3"):
                    asleep()
            if how == "stop":
                raise Interrupted("signal SIGTERM")
            if how == "leave late":
                time.sleep(6)
            else:
                os.kill(os.getpid(), {"die": signal.SIGKILL, "hang": signal.SIGSTOP}[how])
        if how != "leave late":
            distributed.barrier()
    print(f"rank {launch.rank} is done")


if __name__ == "__main__":
    run_rank(main)
