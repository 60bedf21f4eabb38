"""`prism`: token-routed experts whose updates leave out, expert by expert, the directions of earlier tasks.

Source: PRISM (arXiv 2605.01061; its released successor is POLARIS-FMCL), in one process; equations as
numbered in the specification: (1) covariance of each expert's gradients weighted by its routing mass, (3)
union of bases, (4) bilateral projection, (5) interference, (6) caps, (7) budgets by capped water-filling.
y = W₀x + s·Σ_e g_e(x) B_e A_e x with a top-1 router per adapted linear, which learns in the first task and is
frozen afterwards. Protected exactly, at full strength: V_outᵀ(B'A' − BA)V_in = 0. That is no promise of the
same output for protected inputs.

needs_task: no; encoders: none; mergeable: no (a router decides for each token); per task: nothing is added, a
stage's files hold the adapter and at most 4·E·b·(d_in + d_out) bytes of bases per linear (half for square
ones), b ≤ `sketch`.
Simplified, or rather wider: every adapted linear, not q and o of the last eight layers alone; linears that
are not square have two bases, and budgets belong to all bases of a layer that have one width. The federated
rounds are not here; `Protection` is what a client and a server share.

Of the released code not reproduced: the router's gradient, zero at top-1; a gradient projected before Adam,
which leaks (here it is the update that is projected); covariances taken after the projection, d×d each (here
before it, as streaming sketches); adapters in 16 bit. The moments of the optimiser are a stage's own, so none
are left of an earlier task that would have to be projected.
"""

from delo_llava.methods.prism.method import Prism

METHOD = Prism
