"""Before and around a job on a cluster: what it will need, how it is started, whether the machine is fit."""
