"""A server's loop by hand: requests come and go while others run, and pages follow.

python examples/serve.py
"""

import quire

llm = quire.LLM(num_pages=32)
params = quire.SamplingParams(max_tokens=40)


def pages_of(request_id):
    return sum(request_id in owners for owners in llm.table.page_owners())


first = llm.add_request("def read_lines(path):\n", params)
second = None
step = 0
while llm.has_unfinished:
    step += 1
    deltas = llm.step()  # one packed forward: whoever is inside its prompt and whoever writes, together
    if step == 10:
        second = llm.add_request("class Queue:\n", params)
        print("step 10: a second request arrives while the first writes")
    if step == 30:
        print(f"step 30: the second request is dropped, with its {pages_of(second)} pages")
        llm.abort(second)
    for delta in deltas:
        if delta.output is not None:
            print(f"step {step}: request {delta.request_id} ends by {delta.finish_reason}")
            print(delta.output.prompt + delta.output.text)

print(f"{llm.table.allocator.num_available} of {llm.model.num_pages} pages have no owner again")
