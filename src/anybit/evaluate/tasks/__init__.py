"""Generation tasks: prompts to tune, train and measure schedules on."""
