"""Chat templates of the kinds that models come with, each short, and what of :data:`TURNS` is the assistant's in it."""

TURNS = [
    {"role": "system", "content": "Be kind"},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "<think>hm</think>great"},
    {"role": "user", "content": "bad"},
    {"role": "assistant", "content": "<think>no</think>good"},
]

_BOTH = ["<think>hm</think>great", "<think>no</think>good"]

KINDS = {
    "header and end": (  # ChatML, Llama 3, Phi 3, Zephyr
        "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        [f"{text}<|end|>" for text in _BOTH],
    ),
    "no header of an answer": (  # Llama 2
        "{% for message in messages %}{% if message.role == 'assistant' %} {{ message.content | trim }} </s>"
        "{% elif message.role == 'system' %}<<SYS>>{{ message.content }}<</SYS>>"
        "{% else %}[INST] {{ message.content | trim }} [/INST]{% endif %}{% endfor %}",
        [f" {text} </s>" for text in _BOTH],
    ),
    "system with the last question": (  # Mistral
        "{% for message in messages %}{% if message.role == 'user' %}[INST] {% if loop.last or loop.index == 4 %}"
        "{{ messages[0].content }}\n\n{% endif %}{{ message.content }}[/INST]"
        "{% elif message.role == 'assistant' %}{{ message.content }}</s>{% endif %}{% endfor %}",
        [f"{text}</s>" for text in _BOTH],
    ),
    "system with whichever question is last": (
        "{% for message in messages %}{% if message.role == 'user' %}[INST] {% if messages[loop.index0:] | "
        "selectattr('role', 'equalto', 'user') | list | length == 1 %}{{ messages[0].content }}\n\n{% endif %}"
        "{{ message.content }}[/INST]{% elif message.role == 'assistant' %}{{ message.content }}</s>{% endif %}"
        "{% endfor %}",
        [f"{text}</s>" for text in _BOTH],
    ),
    "thoughts of earlier turns are dropped": (  # Qwen 3, DeepSeek R1
        "{% for message in messages %}<|{{ message.role }}|>\n{% if loop.last %}{{ message.content }}{% else %}"
        "{{ message.content.split('</think>')[-1] }}{% endif %}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n<think>\n{% endif %}",
        ["great<|end|>", "<think>no</think>good<|end|>"],
    ),
    "an empty thought is shown in the last turn": (  # Qwen 3 without thinking
        "{% for message in messages %}<|{{ message.role }}|>\n{% if loop.last and message.role == 'assistant' %}"
        "<think>\n\n</think>\n\n{% endif %}{{ message.content.split('</think>')[-1] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        ["great<|end|>", "<think>\n\n</think>\n\ngood<|end|>"],
    ),
    "a line ends an answer": (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        [f" {text}\n" for text in _BOTH],
    ),
    "the assistant has another name": (  # Gemma
        "<bos>{% for message in messages %}<start>{{ 'model' if message.role == 'assistant' else message.role }}\n"
        "{{ message.content | trim }}<end>\n{% endfor %}{% if add_generation_prompt %}<start>model\n{% endif %}",
        [f"{text}<end>" for text in _BOTH],
    ),
    "marked": (
        "{% for message in messages %}{{ message.role }}: {% if message.role == 'assistant' %}{% generation %}"
        "{{ message.content }}!{% endgeneration %}{% else %}{{ message.content }}{% endif %};{% endfor %}",
        [f"{text}!" for text in _BOTH],
    ),
}
