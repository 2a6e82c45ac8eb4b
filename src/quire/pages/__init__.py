"""Page memory: who owns which page, and the tensors that hold them.

    PageAllocator   free list and reference counts over page ids
    PageTable       sequence → its pages, and the slots its next tokens go to
    PrefixCache     tokens → the pages that hold them already
    KVPool          the K and V tensors those page ids point into

Allocator, table and cache are bookkeeping on the host and never see a tensor of the pool; the pool never
sees a sequence. They meet through page ids.
"""

from quire.pages.allocator import PageAllocator
from quire.pages.pool import KVPool
from quire.pages.prefix import Prefix, PrefixCache
from quire.pages.table import AppendResult, PageTable

__all__ = ["AppendResult", "KVPool", "PageAllocator", "PageTable", "Prefix", "PrefixCache"]
