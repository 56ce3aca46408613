"""What the next step computes, and where its KV lies: plans, blocks, the scheduler; integers."""
