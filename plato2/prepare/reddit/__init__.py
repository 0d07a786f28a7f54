"""Reddit dumps to shards: the paper's training data (appendix A), on one machine or a Spark cluster.

Any path from the root of a message tree to a node is one sample: the node is the response, the messages above
it are the context. A message that breaks a rule is removed together with everything below it.

    dumps.py     monthly files of comments -> blocks of lines -> messages, whatever the schema
    rules.py     the ten rules, and what each of them says about one message
    nodes.py     stage 1: a block of lines -> the nodes that pass rules 1-5 and 8-10, their ids encoded
                 stage 2: the messages repeated too often (rule 7): a query of the engine
    threads.py   stage 3: the nodes of whole threads -> samples (rule 6), one shard at a time
    pipeline.py  the stages in order, and stage 4: validation samples, index and data card
    work.py      the folder of a run: finished parts are never done twice
    local.py     the engine on one machine: processes and DuckDB
    spark.py     the engine on a cluster

The stages are plain Python over Arrow; an engine only says where they run and brings the nodes of a thread
together. So both engines write the same samples in the same order (`digest` in index.json), whatever the
number of workers, and a run that was killed resumes from its last finished part.
"""
