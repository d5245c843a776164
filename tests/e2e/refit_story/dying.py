"""`osteo models` that kills itself with SIGKILL at the link: python -m tests.e2e.refit_story.dying MOMENT ARGUMENT...

MOMENT is ``before`` or ``after`` the rename that decides which version is deployed.
"""

from __future__ import annotations

import os
import signal
import sys

from osteo_daemon.cli import main
from osteo_daemon.registry.layout import Layout

if __name__ == "__main__":
    moment, arguments = sys.argv[1], sys.argv[2:]
    deploy = Layout.deploy

    def dying(self: Layout, name: str, version: str) -> None:
        if moment == "after":
            deploy(self, name, version)
        os.kill(os.getpid(), signal.SIGKILL)

    Layout.deploy = dying  # type: ignore[method-assign]
    sys.argv = ["osteo", "models", *arguments]
    main()
