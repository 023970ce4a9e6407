"""The table of tasks, by name: a new task is a file of this folder and a row here."""

from tasks import (
    aokvqa,
    arithmetic,
    coco,
    commonsense,
    demo_tasks,
    fewshot,
    flickr30k,
    glue,
    gqa,
    instruct,
    nocaps,
    okvqa,
    pope,
    retrieval,
    scienceqa,
    textvqa,
    vizwiz,
    vqav2,
)
from tasks.task import Task

_TASKS = (
    vqav2.TASK,
    gqa.TASK,
    okvqa.TASK,
    textvqa.TASK,
    vizwiz.TASK,
    scienceqa.TASK,
    pope.TASK,
    aokvqa.TASK,
    *coco.TASKS,
    flickr30k.TASK,
    nocaps.TASK,
    commonsense.TASK,
    arithmetic.TASK,
    *glue.TASKS,
    instruct.TASK,
    *fewshot.TASKS,
    *retrieval.TASKS,
    *demo_tasks.TASKS,
)
TASKS: dict[str, Task] = {task.name: task for task in _TASKS}
