"""A study on SLURM whose worker jobs dask-jobqueue submits, and submits again as they end.

From the project's folder, which every node must see, on a machine that may submit jobs and that
the nodes can reach:

    make setup-dev
    docs/clusters/make-tls.sh runs/cluster/tls
    .venv/bin/python docs/clusters/slurm_jobqueue.py --jobs 8 -- studies/solubility.toml

What follows `--` goes to `tuner launch`.
"""

import argparse
import signal
import subprocess
import sys
from pathlib import Path

import dask
from dask_jobqueue import SLURMCluster
from distributed import Client, Security

import tuner.cluster.processes  # noqa: F401 - connections that outlive a clock that is set back

#: docs/clusters.md says what these are for.
SCHEDULER_SETTINGS = {
    "distributed.scheduler.allowed-failures": 0,
    "distributed.scheduler.worker-ttl": "60s",
    "distributed.admin.low-level-log-length": 100,
}


def make_cluster(tls: Path, **changes: object) -> SLURMCluster:
    """A scheduler in this process; `scale` and `adapt` submit jobs, each of one worker."""
    ends = {"ca_file": "ca.pem"}
    for side in ("scheduler", "worker", "client"):
        ends |= {f"{side}_cert": "cert.pem", f"{side}_key": "key.pem"}
    files = {f"tls_{name}": str(tls.resolve() / file) for name, file in ends.items()}
    options = {
        "job_name": "tuner-worker",
        "cores": 1,  # threads of a training, on as many cores
        "processes": 1,  # trainings in a job
        "memory": "4GB",
        "walltime": "04:00:00",
        # A slot is a training at a time. The worker leaves, and gives its trial back, before the
        # job's time is over; not all of them at once.
        "worker_extra_args": [
            *("--resources", "slot=1", "--lifetime", "225m", "--lifetime-stagger", "10m")
        ],
        # On GPUs: "job_extra_directives": ["--gres=gpu:1"],
        "job_script_prologue": [
            "export OMP_NUM_THREADS=1 TF_NUM_INTRAOP_THREADS=1 TF_NUM_INTEROP_THREADS=1",
            "export TF_CPP_MIN_LOG_LEVEL=3 TF_FORCE_GPU_ALLOW_GROWTH=true",
            # A worker that Dask pauses would accept trials and never train them.
            "export DASK_DISTRIBUTED__WORKER__MEMORY__PAUSE=False",
        ],
        # Other users share the network, and Dask runs whatever code reaches it.
        "protocol": "tls",
        "security": Security(require_encryption=True, **files),
        "scheduler_options": {"dashboard_address": "127.0.0.1:0"},
    }
    return SLURMCluster(**(options | changes))


def main() -> int:
    """Runs `tuner launch` over a scheduler of its own, and ends with its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=8, help="worker jobs to keep in the queue")
    parser.add_argument("--tls", type=Path, default=Path("runs/cluster/tls"))
    parser.add_argument("launch", nargs="+", help="a study file, and options of `tuner launch`")
    given = parser.parse_args()
    dask.config.set(SCHEDULER_SETTINGS)
    with make_cluster(given.tls) as cluster, Client(cluster) as client:
        # As many at any time: what ended with its wall time is submitted again.
        cluster.adapt(minimum_jobs=given.jobs, maximum_jobs=given.jobs)
        client.wait_for_workers(1)  # `launch` gives up if there is no worker
        certificates = [
            argument
            for option, file in (("ca", "ca.pem"), ("cert", "cert.pem"), ("key", "key.pem"))
            for argument in (f"--tls-{option}", str(given.tls / file))
        ]
        launch = ["launch", *given.launch, "--cluster", cluster.scheduler_address, *certificates]
        tuner = subprocess.Popen([Path(sys.executable).with_name("tuner"), *launch])  # noqa: S603
        # The terminal's Ctrl-C reaches it as well, and it needs the cluster to stop gracefully.
        signal.signal(signal.SIGINT, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: tuner.terminate())
        return tuner.wait()


if __name__ == "__main__":
    sys.exit(main())
