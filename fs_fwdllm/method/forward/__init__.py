"""Forward gradients: clients look and stay where they are, the server steps on what all of them saw (FwdLLM, ATC 2024).

| part | answers |
|---|---|
| :mod:`.client` | what does a client measure at the one point? |
| :mod:`.pool` | what have the probes of a server step measured so far, as scalars? |
| :mod:`.gate` | has the pool seen enough to take a step? |
| :mod:`.directed_sampling` | can a look along the previous estimate help? |
| :mod:`.step_control` | how long is a step, when the estimate's length is mostly noise? |
| :mod:`.pacing`, :mod:`.pooled_step` | gate, sampling and control together; the step itself |
| :mod:`.server`, :mod:`.recipe` | the server's half; which parts make the method |
| :mod:`.cosine` | how good was a step, beside backpropagation? |
"""
