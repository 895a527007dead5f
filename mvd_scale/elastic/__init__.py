"""Jobs that come back by themselves: `mvd-scale supervise` starts the ranks of a host, and restarts them after faults.

    policy        exit codes -> restart or end; limits, back-off, ranks that divide the global batch
    coordinator   which hosts run, from when to when: decisions without sockets or processes
    messages      lines of JSON between the hosts
    server        the coordinator behind a socket of its host
    meeting       which host coordinates, also after the first one is lost
    local_ranks   processes of the ranks of this host
    supervisor    the loop of one host
    command       the supervised command: its recipe and its run folder
    lease_watch   who holds the run folder

Why no launcher of torch or DeepSpeed holds. `deepspeed` (0.19.8, launcher/launch.py:251) ends the tree of its ranks at
SIGTERM and exits with 1: no rank saves, its exit code is lost, SIGUSR1 is not forwarded, and nothing restarts; its
elastic training is gone. torch's `LocalElasticAgent`

- kills ranks 30 s after it has asked them to end, which tears a checkpoint that takes longer: always in torch 2.9 (the
  oldest supported; elastic/multiprocessing/api.py:771), after the end of another rank in 2.14.1 too (:990);
- restarts after every exit code alike, invalid input included (elastic/agent/server/api.py:941), counts for ever
  instead of within a period, and starts the same number of ranks on every host, so that nothing can be a spare.

Its `DynamicRendezvousHandler` with `C10dRendezvousBackend`

- unpickles what anybody who reaches the port has put there (dynamic_rendezvous.py:444);
- compares the wall clocks of hosts to tell which are alive (:475): one that is set back by 15 s takes hosts away;
- is lost with the host of its store, which listens on all addresses.

What it shares with this package are the environment variables of ranks, which any launcher sets.
"""
