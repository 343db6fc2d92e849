"""The loop with people in it: a server, their votes, a store of both, and a learner."""
