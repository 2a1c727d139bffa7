"""The process as part of a job: ranks, environment, heartbeat, stop requests, recorded failures."""
