// Asks, and prints the answer as it comes. Go 1.18 or newer, nothing else. Ctrl-C stops the answer.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"log"
	"net/http"
	"os"
	"os/signal"
)

// Without a model the service's default answers.
type asked struct {
	Message string `json:"message"`
	Model   string `json:"model_id,omitempty"`
}

func main() {
	text, _ := json.Marshal(asked{os.Getenv("CHAT_MESSAGE"), os.Getenv("CHAT_MODEL")})
	// To cancel a request closes its connection, so the provider stops too.
	stop, _ := signal.NotifyContext(context.Background(), os.Interrupt)
	request, _ := http.NewRequestWithContext(stop, "POST", os.Getenv("CHAT_URL")+"/api/v1/chat", bytes.NewReader(text))
	request.Header.Set("Content-Type", "application/json")
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		log.Fatal(err)
	}
	for lines := bufio.NewScanner(response.Body); lines.Scan(); {
		// One event of the answer, or the body of one with an error status. What is no JSON is a
		// blank line or a comment, and leaves it empty.
		var told struct {
			Chunk, Status string
			Error         *struct{ Code, Message string }
		}
		json.Unmarshal(bytes.TrimPrefix(lines.Bytes(), []byte("data: ")), &told)
		if told.Error != nil {
			log.Fatalf("%s: %s", told.Error.Code, told.Error.Message)
		} else if told.Status == "done" {
			return
		}
		os.Stdout.WriteString(told.Chunk)
	}
	log.Fatal("The answer was cut off")
}
