"""What a run needs of torch, lightning, transformers and peft, imported at once: by a run after its config, rows and weights are
checked, and by the server of a sweep's jobs before it forks.

Hundreds of thousands of objects are made, none of them garbage. Not looking for any while they are made takes a quarter less
time; and none is looked at again, so that forked processes go on sharing their pages
(https://docs.python.org/3/library/gc.html#gc.freeze).
"""

import gc
from importlib import import_module

gc.disable()


for name in ("ftcore.train.run", "ftcore.evaluate.score", "peft", "transformers.models.auto", "ftcore.methods.rlhf"):
    import_module(name)


gc.freeze()


gc.enable()
