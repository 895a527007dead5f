"""First start on a machine with a GPU: stages that each stand alone, and one result file.

    python -m mvd_scale.performance.bringup     # launch/gpu_bringup.sh

    __main__ -> runner (standard library only) -> a process per stage: worker -> session -> checks.machine, ...
                  |                                       |
             bringup.md, bringup.json  <-  events.jsonl: begin and end of every check

The runner ends a stage that hangs and goes on after one that crashes. Stages (a) to (c) need torch, Triton and numpy;
the modules of this package that they import need no more.
"""
