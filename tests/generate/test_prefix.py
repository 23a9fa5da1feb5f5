"""The prefix cache, by itself."""

from hypothesis import given, settings
from hypothesis import strategies as st

from neox.generate.prefix import PrefixTree


def grown(tree, *path):
    """The nodes of a path of one-token blocks, all held."""
    nodes, node = [], tree.root
    for token in path:
        block = tree.allocate()
        assert block is not None
        node = tree.insert(node, [token], block)
        nodes.append(node)
    return nodes


def release(tree, nodes):
    for node in reversed(nodes):
        tree.release(node)


def test_prefix_cache_evicts_the_least_recently_used_leaf_first():
    tree = PrefixTree(5)
    first, second = grown(tree, 1, 2), grown(tree, 3, 4)
    release(tree, first)
    release(tree, second)
    tree.acquire(first[0])
    tree.acquire(first[1])
    release(tree, first)  # used again, after the second
    assert tree.available == 5
    owned = [tree.allocate() for _ in range(5)]
    assert owned[1:] == [second[1].block, second[0].block, first[1].block, first[0].block]
    assert tree.stats.evictions == 4
    assert tree.allocate() is None


def test_prefix_cache_keeps_referenced_blocks_and_shares_equal_ones():
    tree = PrefixTree(3)
    held = grown(tree, 1)
    (twin,) = grown(tree, 1)
    assert twin is held[0]
    assert tree.available == 2
    tree.release(twin)
    assert [tree.allocate() is None for _ in range(3)] == [False, False, True]
    assert tree.child(tree.root, [1]) is held[0]


def test_a_sequence_gets_contiguous_blocks_while_there_are_some():
    tree = PrefixTree(64)
    tables = [[tree.allocate()] for _ in range(4)]
    for _ in range(7):
        for table in tables:
            table.append(tree.allocate(table[-1]))
    for table in tables:
        assert table == list(range(table[0], table[0] + 8))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=4), st.integers(0, 6)), max_size=60))
def test_prefix_cache_gives_every_block_one_owner(script):
    """Sequences come with these tokens and go after so many others: free, own and shared blocks are all blocks."""
    tree, running = PrefixTree(6), []
    for path, stay in script:
        nodes, node = [], tree.root
        for token in path:
            if (child := tree.child(node, [token])) is not None:
                tree.acquire(child)
            elif (block := tree.allocate()) is not None:
                child = tree.insert(node, [token], block)
            else:
                break
            nodes.append(child)
            node = child
        running.append((len(running) + stay, nodes))
        for entry in [one for one in running if one[0] < len(running)][:1]:
            running.remove(entry)
            release(tree, entry[1])
        held = {id(node): node for _, nodes in running for node in nodes}
        assert tree.available == 6 - len(held)
        assert len({node.block for node in held.values()}) == len(held)
        for _, nodes in running:
            assert all(tree.child(a, b.tokens) is b for a, b in zip([tree.root, *nodes], nodes, strict=False))
    for _, nodes in running:
        release(tree, nodes)
    assert sorted(tree.allocate() for _ in range(6)) == list(range(6))
