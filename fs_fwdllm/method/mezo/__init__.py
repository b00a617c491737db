"""MeZO in a federation (FedMeZO, KDD 2024): clients take local zeroth-order steps, slopes travel.

After every step a client moves, ``theta <- f theta - lr/P sum_p g_p z_p``, with decay factor ``f = 1 - lr *
weight_decay``, and the server averages where the clients end. Unrolled, client ``k``'s end point is ``f^K theta - lr/P
sum_s f^(K-1-s) sum_p g_sp z_sp``, so the weighted mean over clients is one decay factor and one coefficient per probe:
the decay is exact although no parameter was sent.

| part | answers |
|---|---|
| :mod:`.recipe` | how far is a step? (:func:`~.recipe.coefficients`), and which parts make the method? |
| :mod:`.client` | look, step, look again |
| :mod:`.server` | replay every client's steps at once |

Another method whose clients step is another function in the place of ``coefficients``:
:func:`~.recipe.local_step_recipe` makes worker and server from it.
"""
