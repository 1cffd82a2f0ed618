"""Quality, speed and memory of a model. `anybit.evaluate(...)` is `anybit.evaluate.run.evaluate`.

The public function and its package share a name, and Python binds a package as an attribute of its parent whenever one
of its modules is imported; so the package itself is callable (assigning a module's `__class__` is how Python documents
this).
"""

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> dict[str, Any]:
        """See `anybit.evaluate.run.evaluate`."""
        from anybit.evaluate.run import evaluate  # imports torch: only when called

        return evaluate(*args, **options)


sys.modules[__name__].__class__ = _CallablePackage
