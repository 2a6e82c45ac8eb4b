"""Page memory: who owns which page, and the tensors that hold them.

    PageAllocator   free list and reference counts over page ids
    PageTable       sequence → its pages, and the slots its next tokens go to
    PrefixCache     tokens → the pages that hold them already
    Swap            named pages whose contents are copied to host memory, and brought back
    KVPool          the K and V tensors those page ids point into
    HostPool        host memory for the contents of pages

Allocator, table, cache and swap are bookkeeping on the host and never see a tensor of a pool; pools never
see a sequence. They meet through page ids.
"""

from quire.pages.allocator import PageAllocator
from quire.pages.host_pool import HostPool, host_page_bytes
from quire.pages.pool import KVPool
from quire.pages.prefix import Prefix, PrefixCache
from quire.pages.swap import Swap, SwapCosts
from quire.pages.table import AppendResult, PageTable

__all__ = [
    "AppendResult",
    "HostPool",
    "KVPool",
    "PageAllocator",
    "PageTable",
    "Prefix",
    "PrefixCache",
    "Swap",
    "SwapCosts",
    "host_page_bytes",
]
