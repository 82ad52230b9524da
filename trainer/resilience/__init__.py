"""Keep a long run going: hangs, preemption, loss spikes, slow ranks, restarts, and checks of nodes before a start."""
