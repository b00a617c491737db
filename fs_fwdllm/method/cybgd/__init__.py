"""Cycle block gradient descent (FedCyBGD, arXiv 2406.11187): full-parameter tuning, one block of the model at a time.

| module | question it answers |
|---|---|
| :mod:`.blocks` | which parameters take turns? |
| :mod:`.schedule` | which block is next, and who visits it? |
| :mod:`.optimiser` | how is one block trained? |
| :mod:`.codec`, :mod:`.state_bytes` | what do blocks, deltas and optimiser states look like as bytes? |
| :mod:`.store` | what do server and client hold? |
| :mod:`.server_blocks`, :mod:`.holdings` | what is a client sent, and what does it hold already? |
| :mod:`.visit_queue` | which visits are open, and which are due again? |
| :mod:`.client`, :mod:`.server` | the two halves |
| :mod:`.recipe`, :mod:`.checks` | how do they come from a configuration, and which are refused? |
"""
