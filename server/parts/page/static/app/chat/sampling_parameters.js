// The controls of the parameters that have a default sampling. Ranges are what is useful, not what is possible.

/** @type {Record<string, import("./parameters.js").Parameter[]>} by the title of their group */
export const SAMPLING = {
  "Chance": [
    {
      "name": "temperature",
      "kind": "slider",
      "label": "Temperature",
      "min": 0,
      "max": 2,
      "step": 0.05,
      "fallback": 1,
      "hint": "0 always takes the likeliest token, 1 follows the model's own probabilities, more makes rare tokens likelier."
    }
  ],
  "Which tokens may be chosen": [
    {
      "name": "min_p",
      "kind": "slider",
      "label": "Min-p",
      "min": 0,
      "max": 1,
      "step": 0.01,
      "fallback": 0,
      "hint": "Keeps tokens that are at least this fraction as likely as the likeliest one: few where the model is sure, many where it is not."
    },
    {
      "name": "top_k",
      "kind": "slider",
      "label": "Top-k",
      "min": 0,
      "max": 200,
      "step": 1,
      "fallback": 0,
      "hint": "Keeps this many of the likeliest tokens; 0 keeps all."
    },
    {
      "name": "top_p",
      "kind": "slider",
      "label": "Top-p",
      "min": 0,
      "max": 1,
      "step": 0.01,
      "fallback": 1,
      "hint": "Keeps the likeliest tokens until their probabilities add up to this, so that the long tail of odd tokens is never chosen."
    },
    {
      "name": "typical_p",
      "kind": "slider",
      "label": "Typical-p",
      "min": 0.01,
      "max": 1,
      "step": 0.01,
      "fallback": 1,
      "hint": "Keeps the tokens that are about as surprising as is usual here, until their probabilities add up to this."
    },
    {
      "name": "top_n_sigma",
      "kind": "slider",
      "label": "Top-n-sigma",
      "min": 0,
      "max": 5,
      "step": 0.1,
      "fallback": 0,
      "hint": "Keeps tokens whose logits are within this many standard deviations of the largest; 0 keeps all. Works alike at any temperature."
    },
    {
      "name": "xtc_probability",
      "kind": "slider",
      "label": "XTC probability",
      "min": 0,
      "max": 1,
      "step": 0.01,
      "fallback": 0,
      "hint": "How often XTC removes the likeliest tokens, which makes the text less predictable. 0: never."
    },
    {
      "name": "xtc_threshold",
      "kind": "slider",
      "label": "XTC threshold",
      "min": 0,
      "max": 1,
      "step": 0.01,
      "fallback": 0.1,
      "hint": "XTC removes all tokens that are at least this likely, except the least likely of them."
    }
  ],
  "Repetition": [
    {
      "name": "repetition_penalty",
      "kind": "slider",
      "label": "Repetition penalty",
      "min": 0.5,
      "max": 2,
      "step": 0.01,
      "fallback": 1,
      "hint": "Above 1, tokens that are in the prompt or in the answer become less likely; below 1, likelier."
    },
    {
      "name": "presence_penalty",
      "kind": "slider",
      "label": "Presence penalty",
      "min": -2,
      "max": 2,
      "step": 0.05,
      "fallback": 0,
      "hint": "Subtracted once from the logit of each token that is in the answer: new subjects become likelier."
    },
    {
      "name": "frequency_penalty",
      "kind": "slider",
      "label": "Frequency penalty",
      "min": -2,
      "max": 2,
      "step": 0.05,
      "fallback": 0,
      "hint": "Subtracted from a token's logit for each time that it is in the answer: the more often, the less likely."
    },
    {
      "name": "repeat_last_n",
      "kind": "number",
      "label": "Penalties look back",
      "min": -1,
      "fallback": -1,
      "hint": "How many of the last tokens these penalties consider; -1: all."
    },
    {
      "name": "dry_multiplier",
      "kind": "slider",
      "label": "DRY",
      "min": 0,
      "max": 5,
      "step": 0.05,
      "fallback": 0,
      "hint": "Makes tokens less likely that would go on repeating a sequence that was there before. 0: off; 0.8 is usual."
    },
    {
      "name": "dry_base",
      "kind": "slider",
      "label": "DRY base",
      "min": 1,
      "max": 4,
      "step": 0.05,
      "fallback": 1.75,
      "hint": "How fast DRY's penalty grows with the length of the repetition."
    },
    {
      "name": "dry_allowed_length",
      "kind": "slider",
      "label": "DRY allowed length",
      "min": 1,
      "max": 20,
      "step": 1,
      "fallback": 2,
      "hint": "Repetitions up to this many tokens cost nothing."
    },
    {
      "name": "dry_penalty_last_n",
      "kind": "number",
      "label": "DRY looks back",
      "min": -1,
      "fallback": -1,
      "hint": "How many of the last tokens are searched for repetitions; -1: all."
    },
    {
      "name": "dry_sequence_breakers",
      "kind": "lines",
      "label": "DRY breakers",
      "hint": "One a line. Repetitions do not extend across these texts."
    }
  ],
  "Mirostat": [
    {
      "name": "mirostat",
      "kind": "slider",
      "label": "Version",
      "min": 0,
      "max": 2,
      "step": 1,
      "fallback": 0,
      "hint": "1 and 2 keep the surprise of the text near a target, in place of all samplers except penalties, DRY and temperature. 0: off."
    },
    {
      "name": "mirostat_tau",
      "kind": "slider",
      "label": "Target surprise",
      "min": 0,
      "max": 10,
      "step": 0.1,
      "fallback": 5,
      "hint": "In bits a token: lower is plainer, higher more varied."
    },
    {
      "name": "mirostat_eta",
      "kind": "slider",
      "label": "Learning rate",
      "min": 0,
      "max": 1,
      "step": 0.01,
      "fallback": 0.1,
      "hint": "How fast it corrects itself."
    }
  ],
  "Words and order": [
    {
      "name": "samplers",
      "kind": "lines",
      "label": "Order of samplers",
      "hint": "One a line; those that are left out are off. Empty: penalties, dry, top_n_sigma, temperature, min_p, top_k, typ_p, top_p, xtc."
    }
  ]
};
