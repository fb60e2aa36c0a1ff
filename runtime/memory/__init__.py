"""Memory: ledgers, what a machine has free, pools of physical blocks and tensors over them."""
