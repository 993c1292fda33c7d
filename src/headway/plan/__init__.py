"""`headway plan`: measure this machine, propose a run for a budget, and say what it will give."""
